"""The grid of ranks: order, groups, and what DeepSpeed asks of it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_stable.parallel.topology import Topology
from tests.harness.ranks import Ranks


def describe(tensor: int, pipeline: int) -> dict[str, Any]:
    grid = Topology(tensor, pipeline)
    groups = {
        name: dist.get_process_group_ranks(getattr(grid, f"{name}_group"))
        for name in ("tensor", "data", "pipeline", "model")
    }
    assert (grid.tp.group is None) == (tensor == 1)
    assert dist.get_process_group_ranks(grid.get_model_parallel_group()) == groups["tensor"]
    assert (grid.get_model_parallel_rank(), grid.get_model_parallel_world_size()) == (grid.tp.rank, grid.tp.size)
    assert dist.get_process_group_ranks(grid.get_data_parallel_group()) == groups["data"]
    assert (grid.get_data_parallel_rank(), grid.get_data_parallel_world_size()) == (grid.data_rank, grid.data_size)
    return {"at": (grid.stage, grid.data_rank, grid.tensor_rank), "last": grid.last_stage, **groups}


def test_grid_of_eight(ranks: Ranks) -> None:
    results = ranks.run(8, describe, 2, 2)
    assert [result["at"] for result in results] == [(p, d, t) for p in (0, 1) for d in (0, 1) for t in (0, 1)]
    assert [result["last"] for result in results] == [False] * 4 + [True] * 4
    assert [result["tensor"] for result in results] == [[r // 2 * 2, r // 2 * 2 + 1] for r in range(8)]
    assert [result["data"] for result in results] == [[r - r // 2 % 2 * 2, r - r // 2 % 2 * 2 + 2] for r in range(8)]
    assert [result["pipeline"] for result in results] == [[r % 4, r % 4 + 4] for r in range(8)]
    assert results[5]["model"] == [0, 1, 4, 5] and results[2]["model"] == [2, 3, 6, 7]


def impossible() -> str:
    try:
        Topology(2)
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_that_do_not_fit_are_refused(ranks: Ranks) -> None:
    assert all("3 ranks cannot be split into 2" in message for message in ranks.run(3, impossible))
