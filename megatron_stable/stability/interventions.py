"""What was done to mend a run: where it went back to, which data it skips, and with which changes it goes on.

``RUN/interventions.json`` is the list, oldest first. A checkpoint carries the list that was in force when it was
written, so that a run's line of checkpoints reads like the branches of a history::

    step      0 ── 100 ── 200 ── 300 ── 400          abandoned: written after the rollback's step, without it
                            └── intervention ── 300 ── 400 ── …

Everything that has to hold on every later resume, on any layout, follows from the list: windows to skip, factors of
the learning rate and of gradient clipping, and which checkpoints may be resumed from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_stable.data.skip import SkipWindows
from megatron_stable.errors import ConfigError, DataError
from megatron_stable.files import write_file

FILE = "interventions.json"
Factor = Annotated[float, Field(gt=0, le=1)]


class Intervention(BaseModel):
    """One repair.

    Attributes:
        id: Names it, in checkpoints and the ledger.
        time: ISO 8601, UTC.
        by: Who decided.
        rule: What it answers ("divergence", "the user's word" ...).
        onset: Step at which the trouble began, if known.
        rollback_to: The step of the checkpoint that the run goes on from.
        windows: Data steps to skip, inclusive, from 1.
        learning_rate_factor, clip_factor: From here on, beside those of other interventions.
        reset_loss_scale: Whether fp16's loss scale starts anew.
        reason: In words.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    id: Annotated[str, Field(min_length=1)]
    time: str
    by: Literal["guard", "user"]
    rule: str
    onset: Annotated[int, Field(ge=1)] | None = None
    rollback_to: Annotated[int, Field(ge=0)]
    windows: tuple[tuple[int, int], ...] = ()
    learning_rate_factor: Factor = 1.0
    clip_factor: Factor = 1.0
    reset_loss_scale: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Interventions:
    """The repairs of a run, oldest first."""

    items: tuple[Intervention, ...] = ()

    @classmethod
    def read(cls, run: Path) -> Interventions | None:
        """Those of a run's directory; ``None`` if none were ever written there.

        Raises:
            DataError: The file cannot be used.
        """
        path = run / FILE
        try:
            return cls.parse(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, ConfigError) as error:
            raise DataError(
                f"{path} cannot be used ({error}): restore it from a backup; the newest checkpoint's "
                "manifest.json holds a copy under state.interventions"
            ) from None

    @classmethod
    def parse(cls, values: Any) -> Interventions:
        """From plain values; ValueError or ConfigError if they are none."""
        if not isinstance(values, list):
            raise ValueError("not a list")
        try:
            found = cls(tuple(Intervention.model_validate(value) for value in values))
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        SkipWindows(window for item in found.items for window in item.windows)
        return found

    def to_list(self) -> list[dict[str, Any]]:
        """Plain values for JSON; :meth:`parse` takes them back."""
        return [item.model_dump(mode="json") for item in self.items]

    def write(self, run: Path) -> None:
        """Make these the run's, all or nothing."""
        write_file(run / FILE, (json.dumps(self.to_list(), indent=1) + "\n").encode())

    def add(self, item: Intervention) -> Interventions:
        """These and one more."""
        return Interventions((*self.items, item))

    def undone(self) -> Interventions:
        """These without the last."""
        return Interventions(self.items[:-1])

    @property
    def skip(self) -> SkipWindows:
        """All windows."""
        return SkipWindows(window for item in self.items for window in item.windows)

    @property
    def learning_rate_factor(self) -> float:
        """Of the configuration's learning rate."""
        return prod(item.learning_rate_factor for item in self.items)

    @property
    def clip_factor(self) -> float:
        """Of the configuration's ``optimizer.clip_grad``."""
        return prod(item.clip_factor for item in self.items)

    def since(self, before: Sequence[Intervention]) -> tuple[Intervention, ...] | None:
        """Those made after a list was in force; ``None`` if that list is not the beginning of this one."""
        ids = [item.id for item in before]
        if [item.id for item in self.items[: len(ids)]] != ids:
            return None
        return self.items[len(ids) :]

    def holds(self, step: int, before: Sequence[Intervention]) -> bool:
        """Whether a checkpoint of ``step``, written while ``before`` was in force, belongs to this line of the run."""
        later = self.since(before)
        return later is not None and all(step <= item.rollback_to for item in later)
