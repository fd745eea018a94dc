"""Each collective and its backward by its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_stable.parallel import collectives
from megatron_stable.parallel.topology import TensorParallel, Topology
from tests.harness.ranks import Ranks

SEQUENCE, WIDTH = 8, 3


def value(batch: int, length: int, seed: int) -> Tensor:
    return torch.randn(batch, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def apply(batch: int, name: str, shard_in: bool, shard_out: bool) -> tuple[Tensor, Tensor]:
    """On a rank: output and gradient for inputs and output gradients that differ from rank to rank."""
    tp = Topology(torch.distributed.get_world_size(), sequence=True).tp
    x = value(batch, SEQUENCE // tp.size if shard_in else SEQUENCE, tp.rank).requires_grad_()
    y = getattr(collectives, name)(x, tp)
    y.backward(value(batch, SEQUENCE // tp.size if shard_out else SEQUENCE, 100 + tp.rank))
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tensor", [2, 4])
def test_forward_and_backward(ranks: Ranks, tensor: int, batch: int) -> None:
    full, short = SEQUENCE, SEQUENCE // tensor

    def on_all(length: int, seed: int) -> list[Tensor]:
        return [value(batch, length, seed + rank) for rank in range(tensor)]

    def total(parts: list[Tensor]) -> list[Tensor]:
        return [torch.stack(parts).sum(0)] * tensor

    # tokens in the order of memory, sample after sample
    def gathered(parts: list[Tensor]) -> list[Tensor]:
        return [torch.cat([part.flatten(0, 1) for part in parts]).view(batch, full, WIDTH)] * tensor

    def scattered(parts: list[Tensor]) -> list[Tensor]:
        return [part.view(batch, short, WIDTH) for part in sum(parts).flatten(0, 1).chunk(tensor)]

    wanted: dict[str, tuple[bool, bool, Any, Any]] = {
        "copy_to": (False, False, on_all(full, 0), total(on_all(full, 100))),
        "reduce_from": (False, False, total(on_all(full, 0)), on_all(full, 100)),
        "scatter_tokens": (False, True, scattered(on_all(full, 0)), gathered(on_all(short, 100))),
    }
    for name, (shard_in, shard_out, outputs, gradients) in wanted.items():
        results = ranks.run(tensor, apply, batch, name, shard_in, shard_out)
        for (output, gradient), wanted_output, wanted_gradient in zip(results, outputs, gradients, strict=True):
            torch.testing.assert_close(output, wanted_output, msg=name)
            torch.testing.assert_close(gradient, wanted_gradient, msg=name)


@pytest.mark.parametrize("name", ["copy_to", "reduce_from", "scatter_tokens", "leave_region"])
def test_alone_each_is_the_identity_without_a_trace(name: str) -> None:
    x = torch.randn(2, 4, requires_grad=True)
    assert getattr(collectives, name)(x, TensorParallel(sequence=True)) is x


def overwrite() -> bool:
    """Whether ``reduce_from`` and the backward of ``copy_to`` leave what they are given as it was."""
    tp = Topology(torch.distributed.get_world_size()).tp
    x, gradient = torch.ones(2, 2, 3), torch.ones(2, 2, 3)
    collectives.reduce_from(x, tp)
    collectives.copy_to(torch.zeros(2, 2, 3, requires_grad=True), tp).backward(gradient)
    return bool((x == 1).all() and (gradient == 1).all())


def test_nothing_is_reduced_in_place(ranks: Ranks) -> None:
    assert ranks.run(2, overwrite) == [True, True]


def operators() -> set[str]:
    """What runs on a rank between the collectives of three samples under SP."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not func.is_view:
                names.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    names: set[str] = set()
    tp = Topology(torch.distributed.get_world_size(), sequence=True).tp
    part = value(3, SEQUENCE // tp.size, 0)
    with Names():
        collectives.reduce_scatter_tokens(collectives.all_gather_tokens(part, tp), tp)
    return names


def test_tokens_are_gathered_and_scattered_without_a_copy(ranks: Ranks) -> None:
    (found,) = ranks.run(2, operators, only=[0])  # as gloo copies
    assert found == {"new_empty", "_allgather_base_", "_reduce_scatter_base_"}
