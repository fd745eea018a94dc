"""Kernels that one block starts and bytes that they move, forward and backward, eager and compiled; without a GPU.

    python benchmarks/block_counts.py

Nothing is computed. Eager kernels are PyTorch's operators, one by one, on tensors without storage; F.rms_norm counts as
the one kernel that it is on CUDA. Compiled ones are what Inductor's own scheduler has left after fusion, with the
bytes that it says each reads and writes; a GPU's scheduler splits a few reductions in two, which is not seen here.
Attention is SDPA; a cap needs FlexAttention, whose backward Inductor makes on a GPU only. Ranks are those of a fake
process group.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config as inductor
from torch._inductor.compile_fx import _recursive_joint_graph_passes, _recursive_post_grad_passes
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_stable.config.parametrization import ModelMultipliers
from megatron_stable.config.schema import Config, ModelConfig
from megatron_stable.model.block import Block
from megatron_stable.model.positions import rotary_table
from megatron_stable.parallel.topology import TensorParallel

KINDS = {
    "mm": "products",
    "scaled_dot_product": "attention",
    "c10d": "collectives",
    "clone": "copies",
}  # by a part of their names
BESIDE = ("element-wise", "copies")
FREE = ("_unsafe_view", "detach", "alias", "wait_tensor", "empty", "prim")  # operators that start no kernel


class Case(NamedTuple):
    """A block and what goes through it: ``micro`` sequences on one of ``tensor`` ranks."""

    name: str
    model: dict[str, Any]
    micro: int = 4
    tensor: int = 1


class Work(NamedTuple):
    """Kernels of a block, forward and backward, and bytes, by kind."""

    kernels: dict[str, int]
    moved: dict[str, int]

    def of(self, *kinds: str) -> tuple[int, int]:
        """(kernels, bytes) of these kinds."""
        return sum(self.kernels.get(kind, 0) for kind in kinds), sum(self.moved.get(kind, 0) for kind in kinds)


LLAMA = {"norm": "rmsnorm", "activation": "swiglu"}
CASES = [
    Case("830m baseline", {"size": "830m", "recipe": "baseline"}),
    Case("830m qk_norm", {"size": "830m", "recipe": "qk_norm"}),
    Case("830m qkv_norm", {"size": "830m", "recipe": "qkv_norm"}),
    Case("830m olmo2", {"size": "830m", "recipe": "olmo2"}),
    Case("830m sigma_reparam", {"size": "830m", "recipe": "sigma_reparam"}),
    Case("10b qk_norm", {"size": "10b", "recipe": "qk_norm", **LLAMA}),
    Case("10b qk_norm", {"size": "10b", "recipe": "qk_norm", **LLAMA}, micro=1, tensor=4),
    Case("10b qk_norm", {"size": "10b", "recipe": "qk_norm", **LLAMA}, micro=2, tensor=4),
    Case("10b qk_norm", {"size": "10b", "recipe": "qk_norm", **LLAMA}, micro=4, tensor=4),
]

TINY = {"size": None, "hidden": 64, "heads": 4, "sequence_length": 128, "recipe": "qk_norm"}
SMOKE = [Case("tiny", TINY, micro=3, tensor=tensor) for tensor in (1, 2)]


def model_of(case: Case) -> ModelConfig:
    return Config.model_validate({"model": {"vocab_size": 64000, **case.model}}).model


def make_block(case: Case) -> tuple[Block, Tensor]:
    """A block in bf16 and its input, both without values."""
    model = model_of(case)
    tp = TensorParallel()
    if case.tensor > 1:
        dist.init_process_group("fake", rank=0, world_size=case.tensor, store=FakeStore())
        tp = TensorParallel(dist.group.WORLD, 0, case.tensor, True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        block = Block(model, tp, "sdpa", False, ModelMultipliers(model.head_dim**-0.5))
        return block, torch.empty(case.micro, model.sequence_length // case.tensor, model.hidden, requires_grad=True)
    finally:
        torch.set_default_dtype(before)


def add(work: Work, name: str, moved: int) -> None:
    kind = next((kind for part, kind in KINDS.items() if part in name), "element-wise")
    work.kernels[kind] = work.kernels.get(kind, 0) + 1
    work.moved[kind] = work.moved.get(kind, 0) + moved


class _OneKernel(TorchFunctionMode):
    """F.rms_norm as one kernel each way, as on CUDA: LayerNorm's, which move as much."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.rms_norm:
            x, shape = args
            return F.layer_norm(x, shape, kwargs["weight"])
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    """Adds up what operators read and write."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if not func.is_view and not any(part in name for part in FREE):
            add(self.work, name, sum(each.nbytes for each in tree_leaves((args, kwargs, out)) if torch.is_tensor(each)))
        return out


def eager(case: Case) -> Work:
    """Operator by operator."""
    work = Work({}, {})
    model = model_of(case)
    # made once in a run, and by no block
    rotary_table(model.sequence_length, model.head_dim, model.rope_theta, torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        block, x = make_block(case)
        with _OneKernel(), _Operators(work):
            y = block(x)
            y.backward(torch.empty_like(y))
    return work


def compiled(case: Case) -> Work:
    """By Inductor, up to the point where it would write code."""
    work = Work({}, {})
    block, x = make_block(case)

    def partition(joint: Any, inputs: Any, **options: Any) -> Any:
        _recursive_joint_graph_passes(joint)
        return torch._inductor.compile_fx.min_cut_rematerialization_partition(
            joint, inputs, **options, compiler="inductor"
        )

    def lower(backward: bool) -> Callable[..., Any]:
        def compile_graph(graph: Any, inputs: Any) -> Any:
            made = [getattr(node, "meta", {}).get("val") for node in graph.graph.output_node().args[0]]
            mode = torch._guards.detect_fake_mode(inputs)
            with DebugContext(), V.set_fake_mode(mode):
                _recursive_post_grad_passes(graph, is_inference=False)
                lowering = GraphLowering(
                    graph, inputs, shape_env=mode.shape_env, is_backward=backward, is_inference=False
                )
                with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
                    lowering.run(*inputs)
                    lowering._update_scheduler()
                    for node in lowering.scheduler.nodes:
                        if not isinstance(node, NopKernelSchedulerNode):
                            launched(node)
            return torch._functorch.aot_autograd.make_boxed_func(lambda *_: [like(each) for each in made])

        return compile_graph

    def launched(node: Any) -> None:
        name = "fused"
        if isinstance(node, ExternKernelSchedulerNode):
            name = str(getattr(node.node, "python_kernel_name", None) or getattr(node.node, "op_overload", None))
            if type(node.node).__name__ in ("MultiOutput", "_WaitKernel"):
                return
        add(work, name, node.get_read_write_buffers_sizes())

    block.compile(
        backend=aot_autograd(
            fw_compiler=lower(False), bw_compiler=lower(True), partition_fn=partition,
            decompositions=select_decomp_table,
        ),
        fullgraph=True,
        dynamic=False,
    )  # fmt: skip
    # as on a GPU, where a concatenation is a part of what is around it
    with inductor.patch(force_pointwise_cat=True):
        y = block(x)
        y.backward(torch.empty_like(y))
    torch._dynamo.reset()
    return work


def like(value: Any) -> Any:
    """What a kernel would have made of it, without values."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype) if torch.is_tensor(value) else value


def counted(case: Case, how: Callable[[Case], Work]) -> Work:
    try:
        return how(case)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a small block only")
    cases = SMOKE if parser.parse_args().smoke else CASES
    print("One block, forward and backward, bf16. Beside: products, attention, collectives; KB: per token and rank\n")
    print("| block | TP | sequences | kernels, eager | compiled | beside, eager | compiled | KB, eager | compiled |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in cases:
        both = [counted(case, how) for how in (eager, compiled)]
        tokens = case.micro * model_of(case).sequence_length
        cells = [f"{sum(work.kernels.values())}" for work in both] + [f"{work.of(*BESIDE)[0]}" for work in both]
        cells += [f"{work.of(*BESIDE)[1] / tokens / 1e3:,.0f}" for work in both]
        print(f"| {case.name} | {case.tensor} | {case.micro} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
