"""The event of an operation on a run's model."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import Self

from megatron_stable.stability.event import Event, Number, Step, number, plain
from megatron_stable.stability.interventions import By, Intervention


class Surgery(Event):
    """The model was operated on; the run goes on from a checkpoint of another model. surgery.json has all numbers."""

    event: Literal["surgery"] = "surgery"
    by: By
    """Who decided."""
    rule: str
    """What it answers: `divergence`, …, `named by the user`."""
    id: str | None = None
    """Names it, in interventions.json and checkpoints, if the guard decided."""
    onset: Step | None = None
    """The step in which the trouble began, if there was any."""
    source: str
    """Directory of the checkpoint that was operated on."""
    rollback_to: Step
    """Its step."""
    changes: dict[str, tuple[Any, Any]]
    """What it changed in the configuration, by key: `[before, now]`."""
    before: Number = None
    """Loss of some batches before, nats per token; absent: a crash kept it from being put on record."""
    after: Number = None
    """Loss of the same batches afterwards."""
    verdict: str | None = None
    """On these: `unchanged`, `continuous` or `broken`."""
    reason: str = ""
    """In words."""

    @classmethod
    def of(cls, intervention: Intervention, step: int, source: str) -> Self:
        """The event of the guard's."""
        facts = intervention.model_dump(include={"by", "rule", "id", "onset", "rollback_to", "changes", "reason"})
        return cls(step=step, source=source, **facts)

    def words(self) -> str:
        made = ", ".join(f"{key} {plain(old)} → {plain(new)}" for key, (old, new) in self.changes.items())
        why = f"{self.rule}, began at step {self.onset}" if self.onset is not None else self.rule
        text = f"{self.by} operated on the checkpoint of step {self.rollback_to} ({why}): {made}"
        if self.verdict is not None:
            text += f"; loss {number(self.before)} → {number(self.after)}, {self.verdict}"
        return ". ".join(filter(None, [text, self.reason]))
