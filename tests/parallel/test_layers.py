"""Parallel layers against full-size linear algebra in float64: outputs and all gradients, with and without SP."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_stable.config.schema import ModelConfig
from megatron_stable.model.norms import Norm
from megatron_stable.model.positions import EmbeddingOutput
from megatron_stable.model.transformer import Head
from megatron_stable.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron_stable.parallel.parameters import is_partial, parameter, place
from megatron_stable.parallel.shards import Init
from megatron_stable.parallel.topology import TensorParallel, Topology
from tests.harness.ranks import Ranks

SEQUENCE, HIDDEN, FEATURES, ROWS = 8, 12, 16, 32
CONFIG = ModelConfig(
    size=None,
    layers=1,
    hidden=HIDDEN,
    heads=1,
    sequence_length=SEQUENCE,
    vocab_size=ROWS,
    bias=True,
    positions="learned",
)
ANY = Init(std=1.0)
TOKENS = -1  # in place of a dimension: samples and positions together, as SP splits them


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """What a layer does at full size; which dimension of input and output a rank holds a slice of, or ``TOKENS``."""

    name: str
    input: tuple[int, ...]
    output: tuple[int, ...]
    split_input: int | None
    split_output: int | None


def cases(batch: int, sequence: bool) -> list[Case]:
    stream = (batch, SEQUENCE, HIDDEN)
    along = TOKENS if sequence else None
    return [
        Case("column", stream, (batch, SEQUENCE, FEATURES), along, 2),
        Case("row", (batch, SEQUENCE, FEATURES), stream, 2, along),
        Case("embedding", (batch, SEQUENCE), stream, None, along),
        Case("head", stream, (batch, SEQUENCE, ROWS), along, 2),
        Case("norm", stream, stream, along, along),
        Case("head_norm", (batch, SEQUENCE, 4, HIDDEN), (batch, SEQUENCE, 4, HIDDEN), 2, 2),
        Case("positions", stream, stream, along, along),
    ]


def build(name: str, tp: TensorParallel) -> nn.Module:
    """The layer in float64, its parameters slices of full-size ones that do not depend on the ranks."""
    layer: nn.Module
    if name == "column":
        layer = ColumnParallelLinear(HIDDEN, FEATURES, ANY, tp, bias=True)
    elif name == "row":
        layer = RowParallelLinear(FEATURES, HIDDEN, ANY, tp, bias=True)
    elif name == "embedding":
        layer = VocabParallelEmbedding(ROWS, HIDDEN, ANY, tp)
    elif name == "head":
        layer = Head(parameter((ROWS, HIDDEN), ANY, tp, 0), tp)
    elif name == "positions":
        layer = EmbeddingOutput(CONFIG, tp)
    else:
        # between blocks ranks see parts of the sequence under SP alone; within attention always their own heads
        layer = Norm(HIDDEN, CONFIG, partial=tp.active and (tp.sequence or name == "head_norm"))
    layer.double()
    with torch.no_grad():
        for weight in layer.parameters():
            known = place(weight)
            full = random(known.full_shape, sum(known.full_shape) + len(known.full_shape))
            part = full if known.dim is None else full.chunk(tp.size, known.dim)[tp.rank]
            weight.copy_(part)
    return layer


def given(case: Case) -> tuple[Tensor, Tensor]:
    """Full-size input and output gradient."""
    if case.name == "embedding":
        return torch.randint(ROWS, case.input, generator=torch.Generator().manual_seed(1)), random(case.output, 2)
    return random(case.input, 1), random(case.output, 2)


def on_rank(batch: int, sequence: bool) -> list[list[tuple[Tensor, int | None]]]:
    """On a rank: for each case output, input gradient and parameter gradients, with the dimension each is split on."""
    tp = Topology(torch.distributed.get_world_size(), sequence=sequence).tp

    def mine(x: Tensor, dim: int | None) -> Tensor:
        if dim == TOKENS:
            part = x.flatten(0, 1).chunk(tp.size)[tp.rank]
            return part.view(x.shape[0], -1, *x.shape[2:]).clone()
        return x if dim is None else x.chunk(tp.size, dim)[tp.rank].contiguous()

    results = []
    for case in cases(batch, sequence):
        layer = build(case.name, tp)
        x, direction = given(case)
        x = mine(x, case.split_input)
        if x.is_floating_point():
            x.requires_grad_()
        y = layer(x)
        y.backward(mine(direction, case.split_output))
        found: list[tuple[Tensor, int | None]] = [(y.detach(), case.split_output)]
        if x.grad is not None:
            found.append((x.grad, case.split_input))
        for p in layer.parameters():
            if is_partial(p):
                torch.distributed.all_reduce(p.grad, group=tp.group)
        found += [(p.grad, place(p).dim) for p in layer.parameters() if p.grad is not None]
        results.append(found)
    return results


def by_definition(case: Case) -> list[Tensor]:
    layer = build(case.name, TensorParallel())  # for its full-size parameters alone
    weights = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    x, direction = given(case)
    if case.name in ("column", "row"):
        y = F.linear(x.requires_grad_(), *weights)
    elif case.name == "embedding":
        y = F.one_hot(x, ROWS).double() @ weights[0]
    elif case.name == "head":
        y = x.requires_grad_() @ weights[0].T
    elif case.name == "positions":
        y = x.requires_grad_() + weights[0]
    else:
        x.requires_grad_()
        centred = x - x.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + CONFIG.norm_eps).sqrt() * weights[0] + weights[1]
    leaves = ([x] if x.requires_grad else []) + weights
    return [y.detach(), *torch.autograd.grad((y * direction).sum(), leaves)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sequence", [False, True], ids=["tp", "sp"])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_layers_equal_full_size_algebra(ranks: Ranks, tensor: int, sequence: bool, batch: int) -> None:
    results = ranks.run(tensor, on_rank, batch, sequence)
    for index, case in enumerate(cases(batch, sequence)):
        wanted = by_definition(case)
        assert {len(result[index]) for result in results} == {len(wanted)}
        for number, reference in enumerate(wanted):
            parts = [result[index][number] for result in results]
            what = f"{case.name}: {['output', 'first gradient', 'second gradient', 'third gradient'][number]}"
            dim = parts[0][1]
            if dim is None:
                for part, _ in parts:
                    torch.testing.assert_close(part, reference, rtol=1e-9, atol=1e-9, msg=what)
            else:
                if dim == TOKENS:
                    joined = torch.cat([part.flatten(0, 1) for part, _ in parts]).view(reference.shape)
                else:
                    joined = torch.cat([part for part, _ in parts], dim)
                torch.testing.assert_close(joined, reference, rtol=1e-9, atol=1e-9, msg=what)


def parts_on_rank() -> tuple[Tensor, Tensor]:
    tp = Topology(torch.distributed.get_world_size()).tp
    layer = ColumnParallelLinear(HIDDEN, (2, FEATURES), ANY, tp, bias=True).double()
    with torch.no_grad():
        for weight in layer.parameters():
            known = place(weight)
            assert known.dim == 1
            weight.copy_(random(known.full_shape, len(known.full_shape)).chunk(tp.size, 1)[tp.rank])
    y = layer(random((1, SEQUENCE, HIDDEN), 1))
    first, second = y.detach().chunk(2, -1)
    return first, second


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_parts_of_a_column_are_sharded_alike(ranks: Ranks, tensor: int) -> None:
    results = ranks.run(tensor, parts_on_rank)
    weight, bias = random((2, FEATURES, HIDDEN), 3), random((2, FEATURES), 2)
    for part in range(2):
        wanted = F.linear(random((1, SEQUENCE, HIDDEN), 1), weight[part], bias[part])
        torch.testing.assert_close(torch.cat([result[part] for result in results], -1), wanted)
