"""What attention and the largest logits of its heads cost: FLOPs, bytes, memory; times of all ways, on a GPU.

    python benchmarks/attention.py              # counts anywhere; with a GPU, times, all ways in turn
    python benchmarks/attention.py --smoke      # tiny, on any machine: that all of it runs

Counts are of one layer in bf16, b = 4, s = 4096. FLOPs are those of the causal half; attention forward and backward has
7 products of that size. The bytes of PyTorch's operators are counted one by one, on tensors without storage; those of
the kernel are its queries and keys, once. Predicted times take 400 TFLOP/s or 4 TB/s, whatever takes longer; the last
column sets them beside those of attention, forward and backward. Instructions are those of a cap in the code of an
H100, per logit, by Triton's compiler, where it is installed. A measured time is the median over rounds, in each of
which every way takes its turn; the ratio is to SDPA's of the same round.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from cross_entropy import BANDWIDTH, Traffic
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_stable.model import flash, flex
from megatron_stable.model.backends import BACKENDS
from megatron_stable.model.elementwise import soft_cap
from megatron_stable.model.largest_logits import by_chunks, by_kernel, usable
from megatron_stable.model.scores import Scores

SHAPES = {"24 x 1024": (16, 64), "30 x 1408, 16 heads": (16, 88), "30 x 1408, 11 heads": (11, 128)}  # heads, d
BATCH, LENGTH, CAP, BF16, RATE = 4, 4096, 50.0, 2, 400e12
CAPS = {  # of x, of the cap c; the first is what is around it
    "none": "x * c",
    "libdevice's tanh": "c * libdevice.tanh(x / c)",
    "sigmoid": "2 * c * tl.sigmoid(x * (2 / c)) - c",
}


def counts() -> None:
    """Largest logits, beside the attention that they are of."""
    print(f"b = {BATCH}, s = {LENGTH}, bf16, a layer; predicted, not measured\n")
    print("| shape | head | by | GFLOP | MB moved | MB held | predicted | of attention's |")
    print("|---|---|---|---|---|---|---|---|")
    for shape, (heads, width) in SHAPES.items():
        product = 2 * BATCH * heads * width * LENGTH * (LENGTH + 1) / 2
        attention = 3.5 * 2 * product
        tensor = torch.empty(BATCH, LENGTH, heads, width, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        with Traffic() as traffic:
            by_chunks(tensor, tensor)
        for by, (moved, held) in {"chunks": (traffic.moved, traffic.most), "kernel": (2 * tensor.nbytes, 0)}.items():
            seconds = max(product / RATE, moved / BANDWIDTH)
            print(
                f"| {shape} | {width} | {by} | {product / 1e9:.0f} | {moved / 1e6:,.0f} | {held / 1e6:,.0f} | "
                f"{seconds * 1e3:.2f} ms | {seconds * RATE / attention:.0%} |"
            )


def instructions() -> None:
    """Of each way to write a cap, beside a load, a factor and a store."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    print("\n| cap by | instructions | of the special function unit | branches |\n|---|---|---|---|")
    with TemporaryDirectory() as directory:
        found: dict[str, Counter[str]] = {}
        for name, formula in CAPS.items():
            source = Path(directory) / f"cap_{len(found)}.py"
            source.write_text(
                "import triton\nimport triton.language as tl\nfrom triton.language.extra import libdevice\n\n"
                "@triton.jit\ndef cap(given, out, c: tl.constexpr, block: tl.constexpr):\n"
                f"    i = tl.arange(0, block)\n    x = tl.load(given + i)\n    tl.store(out + i, {formula})\n"
            )
            spec = spec_from_file_location(source.stem, source)
            assert spec is not None and spec.loader is not None
            spec.loader.exec_module(module := module_from_spec(spec))
            types = {"given": "*fp32", "out": "*fp32", "c": "constexpr", "block": "constexpr"}
            aligned = {(i,): [["tt.divisibility", 16]] for i in (0, 1)}
            ast = ASTSource(module.cap, types, constexprs={"c": CAP, "block": 1024}, attrs=aligned)
            code = triton.compile(ast, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["cubin"]
            (Path(directory) / "cubin").write_bytes(code)
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
            said = subprocess.run([tool, "-c", Path(directory) / "cubin"], capture_output=True, text=True, check=True)
            operations = re.findall(r"^\s+/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\d\s+)?([A-Z0-9]+)", said.stdout, re.M)
            found[name] = Counter(each for each in operations if each not in ("NOP", "BRA", "EXIT"))
    base = found.pop("none").total()
    for name, of_8 in found.items():  # logits of a thread
        print(f"| {name} | {(of_8.total() - base) / 8:.1f} | {of_8['MUFU'] / 8:.0f} | {of_8['BSSY'] / 8:.0f} |")


def ways(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
    """Everything that can be timed here; attention forward and backward."""
    width = q.shape[-1]
    upstream = torch.randn_like(q)

    def attention(name: str, cap: float | None = None, held: SDPBackend | None = None) -> Callable[[], object]:
        def run() -> object:
            with sdpa_kernel(held) if held is not None else nullcontext():
                out = BACKENDS[name](q, k, v, Scores(width**-0.5, cap), 0.0)
                return torch.autograd.grad(out, (q, k, v), upstream)

        return run

    def by_tanh() -> object:
        from torch.nn.attention import flex_attention as module

        mask = flex.causal_mask(q.shape[2], str(q.device))
        out: Any = torch.compile(module.flex_attention, dynamic=False)(q, k, v, tanh_mod, mask, scale=width**-0.5)
        return torch.autograd.grad(out, (q, k, v), upstream)

    found: dict[str, Callable[[], object]] = {"sdpa": attention("sdpa")}
    if q.is_cuda:
        found |= {f"sdpa:{each.name}": attention("sdpa", held=each) for each in (
            SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
        )}  # fmt: skip
        found |= {"flex": attention("flex"), f"flex, cap {CAP:g}": attention("flex", CAP)}
        found |= {f"flex, cap {CAP:g} by tanh, no options": by_tanh}
        if (name := flash.module(dropout=False)) is not None:
            said = flash.VERSIONS[name]
            found |= {said: attention("flash"), f"{said}, cap {CAP:g}": attention("flash", CAP)}
    else:
        found |= {f"math, cap {CAP:g}": attention("math", CAP)}
    if usable_here := q.is_cuda and usable(q.device, q.dtype, width):
        found["largest logits by the kernel"] = lambda: by_kernel(q.detach(), k.detach())
    assert usable_here or not q.is_cuda, "Triton does not work here"
    found["largest logits by chunks"] = lambda: by_chunks(q.detach(), k.detach())
    return found


def tanh_mod(score: Tensor, *_: Tensor) -> Tensor:
    return soft_cap(score, CAP)


def seconds(work: Callable[[], object], on_gpu: bool) -> float:
    if not on_gpu:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def times(device: torch.device, length: int, rounds: int) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"\n{machine}, torch {torch.__version__}, {dtype}, s = {length}, measured\n")
    print("| shape | way | ms | x sdpa | MB beside inputs |\n|---|---|---|---|---|")
    for shape, (heads, width) in SHAPES.items():
        q, k, v = (
            torch.randn(BATCH, length, heads, width, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
            for _ in range(3)
        )
        took: dict[str, list[float]] = {}
        held: dict[str, float] = {}
        candidates = ways(q, k, v)
        for name, work in list(candidates.items()):
            try:
                for _ in range(3):
                    work()
            except Exception as error:  # a way that this device does not have is a row
                print(f"| {shape} | {name} | {type(error).__name__}: {str(error).splitlines()[0][:80]} | | |")
                del candidates[name]
                continue
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                work()
                held[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
        for _ in range(rounds):
            for name, work in candidates.items():
                took.setdefault(name, []).append(seconds(work, device.type == "cuda"))
        for name, mine in took.items():
            ratio = median(a / b for a, b in zip(mine, took["sdpa"], strict=True))
            memory = f"{held[name]:,.0f}" if name in held else "–"
            print(f"| {shape} | {name} | {1e3 * median(mine):.3f} | {ratio:.2f} | {memory} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny, in fp32 on the CPU")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    counts()
    try:
        import triton  # noqa: F401
    except ImportError:
        print("\nno instructions are counted, as Triton is not installed: pip install triton")
    else:
        instructions()
    if args.smoke or torch.cuda.is_available():
        times(*((torch.device("cpu"), 64, 2) if args.smoke else (torch.device("cuda"), LENGTH, args.rounds)))


if __name__ == "__main__":
    main()
