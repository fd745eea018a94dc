"""Dropout's masks: rate and scale, alike and different where they must be, a pure function of seed and step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_stable.config.schema import ModelConfig
from megatron_stable.model.transformer import Transformer, layer_list
from megatron_stable.parallel.random import dropout, seed_step, sharded_region
from megatron_stable.parallel.topology import TensorParallel, Topology
from tests.harness.ranks import Ranks

RATE = 0.2
SHAPE = (4, 64, 32)


def mask(tp: TensorParallel) -> Tensor:
    return dropout(torch.ones(SHAPE), RATE, True, tp)


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other)


def independent(one: Tensor, other: Tensor) -> bool:
    """Whether two masks agree no more often than chance has it, within five standard errors."""
    share = float(((one == 0) == (other == 0)).double().mean())
    chance = RATE**2 + (1 - RATE) ** 2
    return abs(share - chance) < 5 * (chance * (1 - chance) / one.numel()) ** 0.5


def test_rate_and_scale() -> None:
    torch.manual_seed(0)
    found = mask(TensorParallel())
    assert found.unique().tolist() == pytest.approx([0.0, 1 / (1 - RATE)])
    n = found.numel()
    assert abs(float((found == 0).double().mean()) - RATE) < 5 * (RATE * (1 - RATE) / n) ** 0.5


def test_off_in_evaluation_and_at_rate_zero() -> None:
    x = torch.ones(SHAPE)
    assert dropout(x, RATE, False, TensorParallel()) is x and dropout(x, 0.0, True, TensorParallel()) is x


def draw(tensor: int, pipeline: int, sequence: bool, seed: int, step: int) -> dict[str, Any]:
    """On a rank: masks of the residual stream, of a sharded region, and of the stream after it."""
    grid = Topology(tensor, pipeline, sequence)
    torch.rand(grid.rank)  # whatever the generators have seen before
    seed_step(seed, step, grid)
    first, second = mask(grid.tp), mask(grid.tp)
    with sharded_region(grid.tp):
        inside = torch.nn.functional.dropout(torch.ones(SHAPE), RATE)
    with sharded_region(grid.tp):
        inside_again = torch.nn.functional.dropout(torch.ones(SHAPE), RATE)
    return {"first": first, "second": second, "inside": inside, "again": inside_again, "after": torch.rand(64)}


@pytest.mark.parametrize("sequence", [False, True], ids=["tp", "sp"])
def test_tensor_parallel_ranks(ranks: Ranks, sequence: bool) -> None:
    one, other = ranks.run(2, draw, 2, 1, sequence, 7, 3)
    for key in ("first", "second"):
        assert (independent if sequence else same)(one[key], other[key]), key
    for key in ("inside", "again"):
        assert independent(one[key], other[key]), "each rank has heads of its own"
    assert same(one["after"], other["after"]), "a sharded region leaves the ranks' generators apart"
    for result in (one, other):
        assert independent(result["first"], result["second"]), "two layers share a mask"
        assert independent(result["inside"], result["again"]), "two sharded regions share a mask"


def test_replicas_and_stages_differ(ranks: Ranks) -> None:
    results = ranks.run(4, draw, 1, 2, False, 7, 3)
    for i, one in enumerate(results):
        for other in results[i + 1 :]:
            assert independent(one["first"], other["first"])


def test_a_pure_function_of_seed_and_step(ranks: Ranks) -> None:
    runs = {key: ranks.run(2, draw, 2, 1, True, *key) for key in ((7, 3), (7, 4), (8, 3))}
    again = ranks.run(2, draw, 2, 1, True, 7, 3)
    for rank in range(2):
        for key in ("first", "second", "inside", "after"):
            assert same(runs[7, 3][rank][key], again[rank][key]), key
        for key in ("first", "inside"):
            assert independent(runs[7, 3][rank][key], runs[7, 4][rank][key]), "two steps share a mask"
            assert independent(runs[7, 3][rank][key], runs[8, 3][rank][key]), "two seeds share a mask"


FIELDS = {"dropout": RATE, "attention_dropout": RATE, "attention": "math"}
LENGTH, WIDTH = 32, 64


def masks_in_the_model(sequence: bool) -> dict[str, list[Tensor]]:
    """On a rank: every mask that a forward of the model applies, by the region it is in, in order."""
    from torch.nn import functional

    config = ModelConfig(
        size=None,
        layers=2,
        hidden=WIDTH,
        heads=4,
        sequence_length=LENGTH,
        vocab_size=61,
        **FIELDS,  # type: ignore[arg-type]
    )
    grid = Topology(torch.distributed.get_world_size(), sequence=sequence)
    model = Transformer(layer_list(config, grid.tp, 1))
    found: dict[str, list[Tensor]] = {"stream": [], "attention": []}
    original = functional.dropout

    def spy(x: Tensor, p: float) -> Tensor:
        if p == 0:
            return x
        assert p == RATE
        mask = original(torch.ones_like(x), p)
        found["attention" if x.ndim == 4 else "stream"].append(mask)
        return x * mask

    functional.dropout = spy
    seed_step(1, 1, grid)
    model.train()(torch.zeros(8, LENGTH, dtype=torch.int64))
    model.eval()(torch.zeros(8, LENGTH, dtype=torch.int64))
    return {key: [mask.detach() for mask in masks] for key, masks in found.items()}


@pytest.mark.parametrize("sequence", [False, True], ids=["tp", "sp"])
def test_masks_in_the_model(ranks: Ranks, sequence: bool) -> None:
    one, other = ranks.run(2, masks_in_the_model, sequence)
    assert len(one["stream"]) == 1 + 2 * 2, "after the embedding, Proj and FC2; none in evaluation"
    assert len(one["attention"]) == 2
    assert one["stream"][0].shape == (8, LENGTH // 2 if sequence else LENGTH, WIDTH)
    assert one["attention"][0].shape == (8, 2, LENGTH, LENGTH)
    for masks in zip(one["stream"], other["stream"], strict=True):
        assert (independent if sequence else same)(*masks)
    for masks in zip(one["attention"], other["attention"], strict=True):
        assert independent(*masks)
    for kind in ("stream", "attention"):
        for number, found in enumerate(one[kind]):
            n = found.numel()
            assert abs(float((found == 0).double().mean()) - RATE) < 5 * (RATE * (1 - RATE) / n) ** 0.5
            assert all(independent(found, later) for later in one[kind][number + 1 :])
