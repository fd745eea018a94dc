"""What a checkpoint says beside its tensors: the layout that wrote it, and the state of the run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_stable.data.course import Course
from megatron_stable.data.stages import Stages
from megatron_stable.engine.loss_scaler import LossScalerState
from megatron_stable.optim.clipping_state import ClippingState
from megatron_stable.persisted import Count, Persisted, Positive
from megatron_stable.stability.guard import GuardState
from megatron_stable.stability.interventions import Intervention


class Layout(Persisted):
    """The ranks that write a checkpoint; rank order is (pipeline, data, tensor), tensor innermost."""

    tensor: Positive = 1
    pipeline: Positive = 1
    data: Positive = 1
    zero_stage: Annotated[int, Field(strict=True, ge=1, le=3)] = 1
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.tensor * self.pipeline * self.data


class RunState(Persisted):
    """What a resume needs beside tensors.

    Attributes:
        optimizer_steps: Updates that were applied.
        moments_from: Of these, the number before the moments began; Adam's bias correction depends on the others.
        optimizer: Statistics of the clipping rule, if it keeps any.
        loss_scaler: Of fp16.
        course: Where the run is in its data, in samples, and what was and will be left out, as it was known then.
        stages: Which source each sample comes from, as it was known then; `None`: an older version wrote it.
        bad_steps: The latest steps with a bad verdict.
        interventions: The interventions in force, oldest first.
        guard: What the guard has come to know.
    """

    optimizer_steps: Count
    moments_from: Count = 0
    optimizer: ClippingState | None = None
    loss_scaler: LossScalerState | None = None
    course: Course
    stages: Stages | None = None
    bad_steps: tuple[Count, ...] = ()
    interventions: tuple[Intervention, ...] = ()
    guard: GuardState = GuardState()

    @model_validator(mode="after")
    def _require_past_moments(self) -> RunState:
        if self.moments_from > self.optimizer_steps:
            raise ValueError("moments_from is beyond optimizer_steps")
        return self
