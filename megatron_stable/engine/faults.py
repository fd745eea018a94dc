"""Faults on purpose, for tests and drills: what goes wrong, at which data steps, on which rank.

``MEGATRON_STABLE_FAULTS`` holds a JSON list; without it nothing here does anything::

    [{"kind": "nan_gradient", "data_steps": [30, 30], "rank": 1},
     {"kind": "inf_loss", "data_steps": [40, 40]},
     {"kind": "scale_gradient", "data_steps": [50, 52], "factor": 100}]

``nan_gradient`` puts a NaN into the gradient of the rank's first parameter, ``inf_loss`` makes the loss that is
reported (not its gradient) infinite on the last stage, ``scale_gradient`` multiplies all gradients. Without ``rank``
every rank is struck. As faults belong to data steps, a run that skips these is spared.
"""

from __future__ import annotations

import json
import os
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn

from megatron_stable.errors import ConfigError

VARIABLE = "MEGATRON_STABLE_FAULTS"


class Fault(BaseModel):
    """One fault; see above."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["nan_gradient", "inf_loss", "scale_gradient"]
    data_steps: tuple[int, int]
    rank: int | None = None
    factor: float = 1.0


class Faults:
    """The faults that strike this rank.

    Raises:
        ConfigError: The variable does not hold a list of faults.
    """

    def __init__(self, rank: int) -> None:
        try:
            given = TypeAdapter(list[Fault]).validate_python(json.loads(os.environ.get(VARIABLE, "[]")))
        except (ValueError, ValidationError) as error:
            raise ConfigError(f"{VARIABLE} is not a list of faults: {error}") from None
        self.all = [fault for fault in given if fault.rank in (None, rank)]
        self.now: dict[str, Fault] = {}

    def begin(self, data_step: int) -> None:
        """Arm the faults of a data step."""
        self.now = {f.kind: f for f in self.all if f.data_steps[0] <= data_step <= f.data_steps[1]}

    def watch(self, module: nn.Module) -> None:
        """Make ``nan_gradient`` possible in a module."""
        if any(fault.kind == "nan_gradient" for fault in self.all):
            next(module.parameters()).register_hook(
                lambda grad: torch.full_like(grad, torch.nan) if "nan_gradient" in self.now else None
            )

    def loss(self, loss: Tensor, sums: Tensor) -> Any:
        """The loss to differentiate; ``sums`` are what is reported."""
        if "inf_loss" in self.now:
            sums += torch.inf
        return loss * self.now["scale_gradient"].factor if "scale_gradient" in self.now else loss
