"""fp16's dynamic loss scaler: its state, as a checkpoint keeps it, and when it is updated. No torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from megatron_stable.persisted import LARGEST, Count, Persisted


class LossScalerState(Persisted):
    """The complete state of fp16's dynamic loss scaler, under DeepSpeed's names.

    Attributes:
        cur_scale: The loss scale.
        cur_iter: Steps so far.
        last_overflow_iter: The last of them that overflowed; -1: none did.
        cur_hysteresis: Overflows until the scale is lowered.
    """

    cur_scale: Annotated[float, Field(gt=0)]
    cur_iter: Count
    last_overflow_iter: Annotated[int, Field(strict=True, ge=-1, lt=LARGEST)]
    cur_hysteresis: Count


class LateUpdate:
    """DeepSpeed's loss scaler, updated when a step is over.

    DeepSpeed 0.19.8 updates it first and then unscales the gradients by the new scale, so that each doubling halves
    the gradients of that step.

    Args:
        scaler: DeepSpeed's ``DynamicLossScaler``.
    """

    def __init__(self, scaler: Any) -> None:
        self._update, self._waiting = scaler.update_scale, False
        scaler.update_scale = self._wait

    def _wait(self, overflow: bool) -> None:
        self._waiting, self._overflow = True, overflow

    def catch_up(self) -> None:
        """Make the update that is due, if any."""
        if self._waiting:
            self._waiting = False
            self._update(self._overflow)
