"""What a rank allocates in a training step, measured, beside what the plan says: within 5% on every layout."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from megatron_stable.analysis import footprint
from megatron_stable.analysis.memory import memory
from megatron_stable.config.schema import Config
from tests.engine.layouts import make_config
from tests.harness.ranks import Ranks
from tests.scale.allocating import allocate_on_rank

BUCKET = 100_000  # elements: DeepSpeed's 50 million would outweigh all else
SHAPE = {"layers": 4, "hidden": 128, "heads": 4, "recipe": "qk_norm", "sequence_length": 128, "vocab_size": 1000}


class Layout(NamedTuple):
    """A world, and which ranks of it are stood up; ``None``: all of them, for real."""

    world: int
    ranks: tuple[int, ...] | None = (0,)
    tensor: int = 1
    pipeline: int = 1
    zero_stage: int = 1
    sequence: bool = False
    dtype: str = "bf16"
    micro_size: int = 1
    micro_batches: int = 4
    model: dict[str, Any] = {}  # noqa: RUF012

    def config(self) -> Config:
        return make_config(
            {**SHAPE, **self.model},
            parallel={
                "tensor": self.tensor,
                "pipeline": self.pipeline,
                "zero_stage": self.zero_stage,
                "sequence": self.sequence,
            },
            precision={"dtype": self.dtype},
            batch={
                "global_size": self.micro_batches * self.micro_size * self.world // (self.tensor * self.pipeline),
                "micro_size": self.micro_size,
            },
        )


LAYOUTS = {
    "zero1": Layout(8),
    "zero1, swiglu, rmsnorm, micro batches of 2": Layout(
        8, micro_size=2, model={"activation": "swiglu", "norm": "rmsnorm"}
    ),
    "zero1, recomputed": Layout(8, micro_size=4, model={"activation_checkpointing": "full"}),
    "zero1, scores in memory": Layout(8, micro_size=2, model={"recipe": "qk_norm_cap"}),
    "zero2": Layout(8, zero_stage=2),
    "zero3": Layout(8, zero_stage=3),
    "tp4": Layout(8, (1,), tensor=4),
    "tp4, sp, micro batches of 2": Layout(8, (1,), tensor=4, sequence=True, micro_size=2),
    "pp4": Layout(8, (0, 2, 6), pipeline=4),
    "tp2, pp2, sp": Layout(8, (0, 7), tensor=2, pipeline=2, sequence=True),
    "tp2, pp2, all ranks": Layout(4, None, tensor=2, pipeline=2),
    "fp32": Layout(8, dtype="fp32"),
    "fp32, one micro batch": Layout(8, dtype="fp32", micro_batches=1),
    "fp16": Layout(8, dtype="fp16"),
    "fp16, pp2": Layout(4, (0, 3), dtype="fp16", pipeline=2),
}
OFTEN = ("zero1", "tp4, sp, micro batches of 2", "pp4", "zero3", "fp32", "fp16")  # the others are in the full product


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS]
)
def test_a_step_allocates_what_is_planned(ranks: Ranks, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUTS[name]
    config, values = layout.config(), layout.config().model_dump(mode="json")
    found = ranks.run(layout.world, allocate_on_rank, values, BUCKET, layout.ranks is not None, only=layout.ranks)
    monkeypatch.setattr(footprint, "BUCKET", BUCKET)
    stages = memory(config, layout.world, "cpu")
    for rank, measured in zip(layout.ranks or range(layout.world), found, strict=True):
        mine = stages[rank * layout.pipeline // layout.world]
        print(f"{name}, rank {rank}: {measured['peak'] / 1e6:.3f} MB measured, {mine.total / 1e6:.3f} MB planned")
        assert mine.total == pytest.approx(measured["peak"], rel=0.05)
        states = measured["states"]
        assert mine.optimizer == pytest.approx(states.get("masters", 0) + states["moments"], rel=0.05) or (
            layout.zero_stage == 3  # whose masters DeepSpeed takes out of the groups between steps
        )
        if layout.zero_stage < 3:
            assert mine.weights == pytest.approx(states["weights"], rel=0.02)
        # what a step comes to beside what is always there is planned as well, not hidden under it
        always = mine.weights + mine.optimizer + mine.gradients
        assert mine.total - always == pytest.approx(measured["peak"] - always, rel=0.15)


def test_in_flight_are_those_of_1f1b() -> None:
    """The schedule played through: forward passes whose backward is still to come."""
    from megatron_stable.engine.schedule import one_forward_one_backward

    for stages, micro_batches in ((4, 8), (4, 2), (2, 1)):
        config = Layout(stages, pipeline=stages, micro_batches=micro_batches).config()
        for number, planned in enumerate(memory(config, stages)):
            held = most = 0
            for forward in one_forward_one_backward(number, stages, micro_batches):
                held += 1 if forward else -1
                most = max(most, held)
            assert planned.in_flight == most
