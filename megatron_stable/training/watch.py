"""What watches over a run in progress: the guard's word on each update, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from math import isfinite
from typing import Any

import torch.distributed as dist

from megatron_stable.checkpoint import store
from megatron_stable.config.schema import Config
from megatron_stable.data import SkipWindows
from megatron_stable.engine.diagnosis import Diagnosis
from megatron_stable.engine.engine import StepMetrics
from megatron_stable.files import explain_os_errors
from megatron_stable.parallel.agreement import together
from megatron_stable.records.directory import RunDirectory
from megatron_stable.records.logbook import sentence
from megatron_stable.stability.guard import Guard, Judgement
from megatron_stable.stability.interventions import Intervention, Interventions
from megatron_stable.stability.recovery import Candidate, Trouble, last_resort, plan

FREQUENT = ("drop", "spike", "spike_end")  # told in the logbook with the next checkpoint
FLOOR = "loss scale at its floor"


class Watch:
    """The guard of a run, its earlier repairs, and the ledger. Every rank has one; rank 0 writes.

    Args:
        config: The run.
        directory: Its directory.
        report: Called on rank 0 with lines for the user.
        rank: This rank.
    """

    def __init__(self, config: Config, directory: RunDirectory, report: Callable[[str], None], rank: int) -> None:
        self.config, self.directory, self.report, self.rank = config, directory, report, rank
        self.guard = Guard(config.guard, fp16=config.precision.dtype == "fp16") if config.guard.mode != "off" else None
        self.interventions = Interventions()
        self.judgement: Judgement | None = None  # on the last step
        self.bad = False  # whether a checkpoint from shortly before it should not be called healthy

    def judge(self, step: int, metrics: StepMetrics) -> bool:
        """Whether the update of a step may be made; every rank comes to the same."""
        if self.guard is None:
            overflow = metrics.skipped and self.config.precision.dtype == "fp16"  # the loss scale's business
            self.bad = not (isfinite(metrics.loss) and (overflow or isfinite(metrics.grad_norm)))
            return isfinite(metrics.grad_norm)
        self.judgement = self.guard.judge(step, metrics.loss, metrics.grad_norm, metrics.skipped)
        self.bad = self.judgement.bad
        return self.judgement.take

    def tell(self, event: str, step: int, **facts: Any) -> None:
        """Put an event into the ledger and before the user; on rank 0."""
        if self.rank != 0:
            return
        self.report(sentence({"event": event, "step": step, **facts}))
        try:
            self.directory.ledger.write(event, step, **facts)
            if event not in FREQUENT:  # a storm of these must not hold training up
                self.directory.tell()
        except OSError as error:
            self.report(f"warning: {self.directory.ledger.path} cannot be written: {error}")

    def catch_up(self, step: int) -> None:
        """Tell of repairs that a crash kept out of the ledger; on rank 0."""
        known = {event.get("id") for event in self.directory.ledger.read()}
        for item in self.interventions.items:
            if item.id not in known:
                self.tell(
                    "rollback" if item.windows else "gave_up", step, **item.model_dump(exclude={"time"}, mode="json")
                )

    def plan(self, trouble: Trouble, skip: SkipWindows, damaged: Collection[int]) -> Intervention | None:
        """The next repair, the same on all ranks; ``None``: give up. Collective; no save may be in progress."""
        data_steps = skip.data_step(trouble.onset), skip.data_step(trouble.step)
        fp16 = self.config.precision.dtype == "fp16"

        def decide(there: list[Candidate]) -> Intervention | None:
            whole = [candidate for candidate in there if candidate.step not in damaged]
            return plan(trouble, whole, data_steps, self.interventions, self.config.guard, fp16)

        return self._agree(decide)

    def commit(self, repair: Intervention, step: int, event: str = "rollback") -> None:
        """Make a repair the run's, for good, before anything is done about it. Collective.

        Raises:
            DataError: On all ranks alike: it cannot be written.
        """
        self.interventions = self.interventions.add(repair)
        with together():
            if self.rank == 0:
                with explain_os_errors("write", self.directory.path):
                    self.interventions.write(self.directory.path)
                    store.point_latest(self.directory.checkpoints, repair.rollback_to)
        self.tell(event, step, **repair.model_dump(mode="json", exclude={"time"}))

    def give_up(self, trouble: Trouble, step: int) -> int | None:
        """Leave the run at a checkpoint from before the trouble, if there is one; returns its step. Collective."""
        repair = self._agree(lambda there: last_resort(trouble, there, self.config.guard))
        if repair is None:
            self.tell("gave_up", step, rule=trouble.rule, onset=trouble.onset, by="guard")
            return None
        self.commit(repair, step, "gave_up")
        return repair.rollback_to

    def _agree(self, decide: Callable[[list[Candidate]], Intervention | None]) -> Intervention | None:
        """What rank 0 decides, knowing the checkpoints there are. Collective."""
        found: list[Intervention | None] = [None]
        with together():
            if self.rank == 0:
                found = [decide(store.candidates(store.entries(self.directory.checkpoints)))]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def tried(self) -> str:
        """What was tried, in words."""
        made = self.interventions
        lines = [f"  {item.reason}" for item in made.items if item.by == "guard" and item.windows]
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
