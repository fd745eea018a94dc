"""Bytes held and sent by ranks of up to 1,024, counted on the engine beside the arithmetic of ``footprint``."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from megatron_stable.analysis.footprint import footprints
from megatron_stable.config.schema import Config
from tests.engine.layouts import make_config
from tests.harness.ranks import Ranks
from tests.scale.counting import count_on_rank


class Layout(NamedTuple):
    """Worlds, and who of them is stood up."""

    world: int
    tensor: int
    pipeline: int
    zero_stage: int
    ranks: tuple[int, ...]
    micro_batches: int = 2

    @property
    def replicas(self) -> int:
        return self.world // (self.tensor * self.pipeline)

    def config(self) -> Config:
        """A model so small that it is stood up in a second, and so wide that padding and biases do not count."""
        return make_config(
            {"layers": 8, "hidden": 256, "heads": 8, "recipe": "qk_norm", "norm": "rmsnorm", "sequence_length": 64},
            parallel={
                "tensor": self.tensor,
                "pipeline": self.pipeline,
                "zero_stage": self.zero_stage,
                "sequence": self.tensor > 1,
            },
            precision={"dtype": "bf16"},
            batch={"global_size": self.micro_batches * self.replicas, "micro_size": 1},
            logging={"probes_every": 0},  # test_probes.py counts these
        )


LAYOUTS = [
    Layout(8, 1, 1, 1, (0, 7)),
    Layout(8, 1, 1, 2, (0, 7)),
    Layout(64, 4, 2, 1, (0, 32, 63)),
    Layout(512, 8, 4, 1, (0, 256, 511)),
    Layout(1024, 8, 1, 1, (0, 512, 1023)),
    Layout(1024, 8, 1, 2, (1023,)),
    Layout(64, 1, 1, 3, (0,)),  # whose other ranks ask the first, which is not there
]


@pytest.fixture(
    scope="module", params=LAYOUTS, ids=lambda it: f"{it.world}-tp{it.tensor}-pp{it.pipeline}-zero{it.zero_stage}"
)
def counted(request: pytest.FixtureRequest, ranks: Ranks) -> tuple[Layout, list[dict[str, Any]]]:
    layout: Layout = request.param
    return layout, ranks.run(layout.world, count_on_rank, layout.config().model_dump(mode="json"), only=layout.ranks)


def test_bytes_held(counted: tuple[Layout, list[dict[str, Any]]]) -> None:
    layout, found = counted
    expected = footprints(layout.config(), layout.world)
    for rank, result in zip(layout.ranks, found, strict=True):
        mine = expected[rank * layout.pipeline // layout.world]
        held = result["held"]
        assert result["parameters"] == mine.parameters
        if layout.zero_stage < 3:
            assert held["weights"] == pytest.approx(mine.weights, rel=0.02)
        states = held.get("masters", 0) + held.get("moments", 0)
        if layout.zero_stage == 1:
            # beside the gradients there are activations, of which such short sequences have little
            assert held["gradients"] == pytest.approx(mine.gradients, rel=0.01, abs=65536)
            assert states == pytest.approx(mine.optimizer, rel=0.05)
        total = sum(held.values())
        assert total <= 1.05 * mine.states + 65536
        assert total >= 0.95 * (mine.states - mine.buckets)


def test_bytes_sent(counted: tuple[Layout, list[dict[str, Any]]]) -> None:
    layout, found = counted
    expected = footprints(layout.config(), layout.world)
    for rank, result in zip(layout.ranks, found, strict=True):
        mine = expected[rank * layout.pipeline // layout.world]
        between = {name: size for (name, members), size in result["sent"].items() if members == layout.replicas}
        if layout.zero_stage == 3:  # which keeps such small weights once it has them
            del between["_allgather_base_"]
            mine = replace(mine, dp_bytes=mine.dp_bytes / 2)
        assert on_the_wire(between, layout.replicas) == pytest.approx(mine.dp_bytes, rel=0.05)
        if layout.tensor > 1:
            within = {name: size for (name, members), size in result["sent"].items() if members == layout.tensor}
            assert on_the_wire(within, layout.tensor) == pytest.approx(mine.tp_bytes, rel=0.05)
        assert sum(size for (name, _), size in result["sent"].items() if name == "send") == pytest.approx(mine.pp_bytes)


def test_bytes_sent_without_sequence_parallelism(ranks: Ranks) -> None:
    """Stages send slices of what TP ranks have alike, and the receivers put them together."""
    layout = Layout(4, 2, 2, 1, (0, 1, 2, 3))
    config = layout.config()
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"sequence": False})})
    found = ranks.run(4, count_on_rank, config.model_dump(mode="json"), 2, False)
    for rank, result in enumerate(found):
        mine = footprints(config, 4)[rank // 2]
        sizes = Counter(dict[str, int]())
        for (name, members), size in result["sent"].items():
            if name == "send" or members == 2:
                sizes[name] += size
        assert sizes.pop("send") == pytest.approx(mine.pp_bytes, rel=0.01)
        assert on_the_wire(sizes, 2) == pytest.approx(mine.tp_bytes, rel=0.05)


def on_the_wire(sent: dict[str, int], members: int) -> float:
    """Bytes that a rank sends around a ring, by what it puts into collectives."""
    each = {"allreduce_": 2 / members, "_reduce_scatter_base_": 1 / members, "_allgather_base_": 1.0}
    return sum(size * each[name] * (members - 1) for name, size in sent.items() if name in each)


def test_groups_are_those_of_the_grid(counted: tuple[Layout, list[dict[str, Any]]]) -> None:
    layout, found = counted
    for rank, result in zip(layout.ranks, found, strict=True):
        groups = result["groups"]
        first = rank - rank % layout.tensor
        assert groups["tensor_group"] == list(range(first, first + layout.tensor))
        stage = layout.world // layout.pipeline
        assert groups["pipeline_group"] == list(range(rank % stage, layout.world, stage))
        begin = rank // stage * stage
        assert groups["data_group"] == list(range(begin + rank % layout.tensor, begin + stage, layout.tensor))
        assert groups["stage_group"] == list(range(begin, begin + stage))


def test_partial_gradients_are_summed_at_once(ranks: Ranks) -> None:
    """Under SP a stage without the loss all-reduces over its TP group once per step, however many norms it has."""
    layout = Layout(64, 4, 2, 1, (0,))
    (found,) = ranks.run(64, count_on_rank, layout.config().model_dump(mode="json"), only=[0])
    assert found["calls"]["allreduce_", layout.tensor] == 1
