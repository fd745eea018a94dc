"""What the loss moves through memory and holds there, by PyTorch's operators and by the kernels of CUDA; times of both.

python benchmarks/cross_entropy.py [--tokens 8192]

Bytes per logit, forward and backward, bf16: PyTorch's counted operator by operator, on tensors without storage; the
kernels' from their loads and stores, one forward, one of each backward. Memory is the most beside the logits. Predicted
times are bytes / 4 TB/s. With a GPU, the measured ones follow, with F.cross_entropy under torch.compile beside them.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_stable.model.cross_entropy import PYTORCH, Columns, Steps
from megatron_stable.model.cross_entropy_kernels import TRITON, usable
from megatron_stable.model.elementwise import soft_cap
from megatron_stable.model.loss import CrossEntropy
from megatron_stable.parallel.topology import TensorParallel

VOCABULARIES, CAPS = (2**16, 2**18), (None, 30.0)
BANDWIDTH = 4e12  # bytes per second: a H200's 4.8e12, less what a stream of loads and stores does not reach
BF16, Z_LOSS = 2, 1e-4
KERNELS = 3 * BF16  # a load forward; a load and a store backward
WRITE_ONLY = {"copy_", "fill_", "zero_"}  # do not read what they write to
SPARSE = {"gather", "scatter_add_"}  # touch as many elements as they have indices; counted as wide as these


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write, and the most that lives of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.live = self.most = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()  # storages that were made here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [each for each in tree_leaves(out) if torch.is_tensor(each)]
        name = func.overloadpacket.__name__
        if not func.is_view and "empty" not in name:
            read = [each for each in tree_leaves((args, kwargs)) if torch.is_tensor(each)]
            if name.startswith("new_") or name.endswith("_like"):
                read = []  # but a shape and a dtype
            if name in SPARSE:
                self.moved += 3 * args[2].nbytes
            else:
                self.moved += sum(each.nbytes for each in (*read[name in WRITE_ONLY :], *made))
        given = {id(each.untyped_storage()) for each in tree_leaves((args, kwargs)) if torch.is_tensor(each)}
        for storage in (each.untyped_storage() for each in made):
            if id(storage) not in given and storage not in self.known:
                self.known.add(storage)
                self.live += storage.nbytes()
                self.most = max(self.most, self.live)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return out

    def _gone(self, size: int) -> None:
        self.live -= size


def forward_backward(logits: Tensor, targets: Tensor, cap: float | None, steps: Steps) -> Tensor:
    """The gradient of the mean cross-entropy and z-loss."""
    columns = Columns(0, logits.shape[1], cap)
    nll, log_z = CrossEntropy.apply(logits, targets, TensorParallel(), columns, steps, True)
    return torch.autograd.grad(nll.mean() + Z_LOSS * log_z.square().mean(), logits)[0]


def by_torch_alone(logits: Tensor, targets: Tensor, cap: float | None) -> Tensor:
    """The same loss by the operators that a user would take, which a compiler may fuse."""
    y = logits.float() if cap is None else soft_cap(logits.float(), cap)
    return F.cross_entropy(y, targets) + Z_LOSS * y.logsumexp(1).square().mean()


def counted(tokens: int, vocabulary: int, cap: float | None) -> tuple[float, int]:
    """(bytes moved per logit, most bytes beside the logits) by PyTorch's operators."""
    logits = torch.empty(tokens, vocabulary, dtype=torch.bfloat16, device="meta", requires_grad=True)
    targets = torch.empty(tokens, dtype=torch.int64, device="meta")
    with Traffic() as traffic:
        forward_backward(logits, targets, cap, PYTORCH)
    return traffic.moved / logits.numel(), traffic.most


def measured(work: Callable[[], object], times: int = 10) -> tuple[float, int]:
    """(seconds, most bytes beside what is there) of a call, after three that do not count."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / times, torch.cuda.max_memory_allocated() - before


def print_counts(tokens: int) -> None:
    print(f"{tokens} tokens, bf16; beside their logits; predicted at {BANDWIDTH / 1e12:g} TB/s, not measured\n")
    print("| vocabulary | cap | by | bytes per logit | memory beside the logits | predicted |")
    print("|---|---|---|---|---|---|")
    for vocabulary in VOCABULARIES:
        for cap in CAPS:
            for by, (per_logit, memory) in {
                "PyTorch": counted(tokens, vocabulary, cap),
                "kernels": (KERNELS, 0),
            }.items():
                microseconds = per_logit * vocabulary / BANDWIDTH * 1e6
                print(
                    f"| {vocabulary:,} | {cap or 'none'} | {by} | {per_logit:.1f} | {memory / 1e9:.2f} GB | "
                    f"{microseconds:.2f} µs per token |"
                )


def print_times(tokens: int) -> None:
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, measured\n")
    print("| vocabulary | cap | by | µs per token | memory beside the logits |\n|---|---|---|---|---|")
    for vocabulary in VOCABULARIES:
        targets = torch.randint(vocabulary, (tokens,), device="cuda")
        logits = torch.randn(tokens, vocabulary, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for cap in CAPS:
            compiled = torch.compile(by_torch_alone, dynamic=False)
            for by, work in {
                "PyTorch": lambda cap=cap: forward_backward(logits, targets, cap, PYTORCH),  # noqa: B023
                "torch.compile": lambda f=compiled, cap=cap: torch.autograd.grad(f(logits, targets, cap), logits),  # noqa: B023
                "kernels": lambda cap=cap: forward_backward(logits, targets, cap, TRITON),  # noqa: B023
            }.items():
                seconds, memory = measured(work)
                each = seconds / tokens * 1e6
                print(f"| {vocabulary:,} | {cap or 'none'} | {by} | {each:.3f} | {memory / 1e9:.2f} GB |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    tokens = parser.parse_args().tokens
    print_counts(tokens)
    if torch.cuda.is_available() and usable(torch.device("cuda")):
        print_times(tokens)


if __name__ == "__main__":
    main()
