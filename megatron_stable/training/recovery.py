"""Recovery in a live run: agree on an intervention, make it the run's, and in the end leave it where it can go on.

What to do is decided by :mod:`megatron_stable.stability.recovery`, which is pure; here all ranks come to know it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from megatron_stable.checkpoint import store
from megatron_stable.checkpoint.store import Shelf
from megatron_stable.config.schema import Config
from megatron_stable.config.surgery import recipe_values
from megatron_stable.data import Course
from megatron_stable.engine.diagnosis import Diagnosis
from megatron_stable.files import explain_os_errors
from megatron_stable.parallel.agreement import decided
from megatron_stable.records.callbacks import Callbacks
from megatron_stable.records.directory import RunDirectory
from megatron_stable.records.interventions import write_interventions
from megatron_stable.stability.events import GaveUp, Rollback, Surgery
from megatron_stable.stability.interventions import Intervention, Interventions
from megatron_stable.stability.recovery import Candidate, Trouble, last_resort, plan
from megatron_stable.training.operation import kept

FLOOR = "loss scale at its floor"


class Recovery:
    """The interventions of a run. Collective: every rank has one, and calls its methods.

    Args:
        shelf: The run's checkpoints.
        callbacks: Told of what is done.

    Attributes:
        interventions: Those in force.
    """

    def __init__(self, config: Config, directory: RunDirectory, shelf: Shelf, callbacks: Callbacks) -> None:
        self.config, self.directory, self.shelf, self.callbacks = config, directory, shelf, callbacks
        self.interventions = Interventions()

    def plan(self, trouble: Trouble, course: Course, damaged: Collection[int]) -> Intervention | None:
        """The next intervention, the same on all ranks; ``None``: give up. No save may be in progress.

        Args:
            course: Of the run so far.
            damaged: Steps of checkpoints that cannot be used.
        """
        if self.config.guard.mode != "recover":
            return None
        fp16 = self.config.precision.dtype == "fp16"

        def decide() -> Intervention | None:
            whole = self._whole(damaged)
            return plan(trouble, whole, course, self.interventions, self.config.guard, fp16, self._surgery())

        return decided(decide)

    def _whole(self, damaged: Collection[int]) -> list[Candidate]:
        return [candidate for candidate in self.shelf.candidates() if candidate.step not in damaged]

    def _surgery(self) -> dict[str, tuple[Any, Any]]:
        """What an operation would change."""
        recipe, now = self.config.guard.surgery, self.config.by_key()
        return {key: (now[key], to) for key, to in recipe_values(recipe, self.config).items()} if recipe else {}

    def commit(self, event: Rollback | GaveUp | Surgery, intervention: Intervention) -> None:
        """Make an intervention the run's, before anything is done about it.

        Raises:
            DataError: On all ranks alike: it cannot be written.
        """
        self.interventions = self.interventions.add(intervention)

        def write() -> None:
            with explain_os_errors("write", self.directory.path):
                write_interventions(self.directory.path, self.interventions)
                store.point_latest(self.directory.checkpoints, intervention.rollback_to)

        decided(write)
        self.callbacks.event(event)

    def give_up(self, trouble: Trouble, step: int, damaged: Collection[int]) -> int | None:
        """Leave the run at a checkpoint from before the trouble that can be used, if there is one; returns its step."""
        intervention = decided(lambda: last_resort(trouble, self._whole(damaged), self.config.guard))
        if intervention is None:
            self.callbacks.event(GaveUp(step=step, rule=trouble.rule, onset=trouble.onset, by="guard"))
            return None
        self.commit(GaveUp.of(intervention, step), intervention)
        return intervention.rollback_to

    def catch_up(self, step: int) -> None:
        """Tell of interventions that a crash kept out of the ledger; on rank 0."""
        known = {event.id for event in self.directory.ledger.read() if isinstance(event, Rollback | GaveUp | Surgery)}
        for item in self.interventions.items:
            if item.id not in known and item.changes:
                self.callbacks.event(Surgery.of(item, step, str(kept(self.directory, item))))
            elif item.id not in known:
                self.callbacks.event((Rollback if item.windows else GaveUp).of(item, step))

    def tried(self) -> str:
        """What was tried, in words."""
        made = self.interventions
        lines = [f"  {item.reason}" for item in made.items if item.by == "guard" and (item.windows or item.changes)]
        if not lines:
            return "nothing was tried"
        force = f"learning rate x {made.learning_rate_factor:g}, clip_grad x {made.clip_factor:g}"
        undo = f"megatron-stable skip {self.directory.path} --undo"
        return "\n".join(["what was tried:", *lines, f"in force: {force}; `{undo}` takes it back, one by one"])


def explain_floor(diagnosis: Diagnosis, min_scale: float, step: int, data_step: int) -> str:
    """The end of a loss scale, in words."""
    norms = ", ".join(
        f"{layer} {'not finite' if norm is None else f'{norm:.3g}'}" for layer, norm in diagnosis.norms.items()
    )
    return (
        f"the fp16 loss scale is at its floor, precision.min_scale {min_scale:g}, and gradients of step {step} (data "
        f"step {data_step}) overflow still.\nfirst module with values that are not finite: "
        f"{diagnosis.module or 'none in a replay'}\ngradient norms by layer: {norms}"
    )
