"""What was done to mend a run: where it went back to, which data it skips, and with which changes it goes on.

``RUN/interventions.json`` is the list, oldest first. A checkpoint carries the list that was in force when it was
written, so that a run's line of checkpoints reads like the branches of a history::

    step      0 ── 100 ── 200 ── 300 ── 400          abandoned: written after the rollback's step, without it
                            └── intervention ── 300 ── 400 ── …

Everything that has to hold on every later resume, on any layout, follows from the list: windows to skip, factors of
the learning rate and of gradient clipping, and which checkpoints may be resumed from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from megatron_stable.data.skip import SkipWindows, Stretch, Window

By: TypeAlias = Literal["guard", "user"]
Factor: TypeAlias = Annotated[float, Field(gt=0, le=1)]


class Decision(BaseModel):
    """What was decided to mend a run: who, why, and what changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    by: By
    """Who decided."""
    rule: str
    """What it answers: `divergence`, `consecutive drops`, `named by the user` …"""
    onset: Annotated[int, Field(ge=1)] | None = None
    """The step in which the trouble began, if that is known."""
    windows: tuple[Window, ...] = ()
    """Data steps to skip: `[first, last]`, inclusive, counted from 1, as they were counted then."""
    samples: tuple[Stretch, ...] = ()
    """The same in samples of the data order, counted from 0: `[first, end]`, the second no longer skipped. This holds,
    whatever becomes of the batch size."""
    learning_rate_factor: Factor = 1.0
    """Of the learning rate from here on, beside those of earlier decisions."""
    clip_factor: Factor = 1.0
    """Of `optimizer.clip_grad` from here on, beside those of earlier decisions."""
    reset_loss_scale: bool = False
    """Whether fp16's loss scale starts anew."""
    reason: str = ""
    """In words."""


class Intervention(Decision):
    """A decision that is in force."""

    id: Annotated[str, Field(min_length=1)]
    """Names it, in checkpoints and the ledger."""
    time: str
    """ISO 8601, UTC."""
    rollback_to: Annotated[int, Field(ge=0)]
    """The step of the checkpoint that the run goes on from."""
    changes: dict[str, tuple[Any, Any]] = Field(default_factory=dict)
    """What surgery changed in the configuration, by key: `[before, now]`. It holds on every later start."""

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if len(self.windows) != len(self.samples):
            raise ValueError(f"{len(self.windows)} windows of data steps, but {len(self.samples)} of samples")
        return self


@dataclass(frozen=True)
class Interventions:
    """The interventions of a run, oldest first."""

    items: tuple[Intervention, ...] = ()

    def add(self, item: Intervention) -> Interventions:
        """These and one more."""
        return Interventions((*self.items, item))

    def undone(self) -> Interventions:
        """These without the last."""
        return Interventions(self.items[:-1])

    @property
    def skip(self) -> SkipWindows:
        """All samples that are skipped."""
        return SkipWindows(stretch for item in self.items for stretch in item.samples)

    @property
    def learning_rate_factor(self) -> float:
        """Of the configuration's learning rate."""
        return prod(item.learning_rate_factor for item in self.items)

    @property
    def clip_factor(self) -> float:
        """Of the configuration's ``optimizer.clip_grad``."""
        return prod(item.clip_factor for item in self.items)

    @property
    def changes(self) -> dict[str, Any]:
        """What surgery has made of the configuration, by key."""
        return {key: now for item in self.items for key, (_, now) in item.changes.items()}

    def applied(self, values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """What surgery makes of configured values, by section: those that still are what they were become what they are
        now, and one that was given anew stands."""
        now = {f"{section}.{name}": value for section, fields in values.items() for name, value in fields.items()}
        found: dict[str, Any] = {}
        for item in self.items:
            found |= {key: to for key, (was, to) in item.changes.items() if found.get(key, now.get(key)) == was}
        return found

    def since(self, before: Sequence[Intervention]) -> tuple[Intervention, ...] | None:
        """Those made after a list was in force; ``None`` if that list is not the beginning of this one."""
        ids = [item.id for item in before]
        if [item.id for item in self.items[: len(ids)]] != ids:
            return None
        return self.items[len(ids) :]

    def holds(self, step: int, before: Sequence[Intervention]) -> bool:
        """Whether a checkpoint of ``step``, written while ``before`` was in force, belongs to this line of the run."""
        later = self.since(before)
        # one from before an operation is of another model
        return later is not None and all(step <= item.rollback_to and not item.changes for item in later)
