"""Splitting layers into pipeline stages, against trying every split."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_stable.config.schema import ModelConfig
from megatron_stable.model.transformer import layer_list
from megatron_stable.parallel.stages import stage_bounds
from megatron_stable.parallel.topology import TensorParallel


def brute_force(costs: list[float], blocks: list[bool], stages: int) -> float:
    """The lowest possible cost of the dearest stage."""
    splits = ((0, *cuts, len(costs)) for cuts in itertools.combinations(range(1, len(costs)), stages - 1))
    return min(
        max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))
        for bounds in splits
        if all(any(blocks[a:b]) for a, b in itertools.pairwise(bounds))
    )


@settings(deadline=None)
@given(
    layers=st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=9),
    stages=st.integers(1, 5),
)
def test_bounds_are_the_best_possible(layers: list[tuple[int, bool]], stages: int) -> None:
    costs, blocks = [float(cost) for cost, _ in layers], [block for _, block in layers]
    if sum(blocks) < stages:
        with pytest.raises(ValueError, match="cannot fill"):
            stage_bounds(costs, blocks, stages)
        return
    bounds = stage_bounds(costs, blocks, stages)
    assert len(bounds) == stages + 1 and bounds[0] == 0 and bounds[-1] == len(costs)
    assert all(any(blocks[a:b]) for a, b in itertools.pairwise(bounds)), "a stage without a block"
    assert max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds)) == brute_force(costs, blocks, stages)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("vocab", [61, 256000])
def test_a_dear_head_gets_fewer_blocks_beside_it(stages: int, vocab: int) -> None:
    config = ModelConfig(size=None, layers=8, hidden=64, heads=4, sequence_length=128, vocab_size=vocab)
    layers = layer_list(config, TensorParallel(), seed=0)
    is_block = [layer.name.startswith("blocks.") for layer in layers]
    bounds = stage_bounds([layer.cost for layer in layers], is_block, stages)
    counts = [sum(is_block[a:b]) for a, b in itertools.pairwise(bounds)]
    assert sum(counts) == 8 and min(counts) >= 1
    if stages > 1 and vocab == 256000:
        assert counts[-1] == 1, "the head costs more than all blocks"
    if vocab == 61 and stages in (2, 4):
        assert counts == [8 // stages] * stages


def test_many_layers_are_split_at_once() -> None:
    costs, blocks = [0.0, *[1.0] * 200, 3.0], [False, *[True] * 200, False]
    bounds = stage_bounds(costs, blocks, 16)
    assert max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds)) == 13.0
