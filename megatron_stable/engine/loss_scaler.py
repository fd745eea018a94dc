"""The state of fp16's dynamic loss scaler, as a checkpoint keeps it. No torch."""

from __future__ import annotations

from typing import Annotated

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
