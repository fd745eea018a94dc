"""Repair a stopped run by hand: find the spike, choose checkpoint and data to skip, apply, undo."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_stable.config.load import load_config
from megatron_stable.config.schema import GuardConfig
from megatron_stable.data.files import explain_os_errors
from megatron_stable.data.skip import SkipWindows
from megatron_stable.engine.checkpoint import store
from megatron_stable.engine.checkpoint.health import verdict
from megatron_stable.errors import ConfigError, DataError
from megatron_stable.stability.detector import Spike
from megatron_stable.stability.interventions import Intervention, Interventions
from megatron_stable.stability.recovery import Candidate, attempt, choose, new_id, now, rung, window
from megatron_stable.training.directory import RunDirectory


@dataclass(frozen=True)
class Changes:
    """What else to change; ``None``: what the run's ladder (``guard.*_factors``) says for this attempt."""

    learning_rate_factor: float | None = None
    clip_factor: float | None = None
    reset_loss_scale: bool = True


class StoppedRun:
    """A run that is not in progress.

    Raises:
        ConfigError: It is no run's directory.
        DataError: Its checkpoints or interventions cannot be used.
    """

    def __init__(self, run: str | Path) -> None:
        self.directory = RunDirectory(run)
        if not self.directory.config.is_file():
            raise ConfigError(f"{run} is no run's directory: it has no config.yaml; name the run.directory of a run")
        self.config = load_config(self.directory.config)
        self.guard: GuardConfig = self.config.guard
        self.entries = [entry for entry in store.entries(self.directory.checkpoints) if entry.usable]
        newest = self.entries[-1].manifest if self.entries else None
        own = Interventions.read(self.directory.path)
        self.done = own if own is not None else store.written_under(newest) if newest else Interventions()
        trained = SkipWindows(newest.state["skip_windows"]) if newest else SkipWindows()
        ahead = SkipWindows([*self.config.data.skip, *self.done.skip.windows])
        self.skip = trained.continued(int(newest.state["data_step"]) if newest else 0, ahead)
        """Windows in force, as the newest checkpoint and all interventions have them."""

    @property
    def candidates(self) -> list[Candidate]:
        """Its checkpoints."""
        return [
            Candidate(entry.step, int(entry.manifest.state["data_step"]), verdict(entry.directory))
            for entry in self.entries
            if entry.manifest is not None
        ]

    def after_spike(self, spike: Spike, changes: Changes, checkpoint: int | None = None) -> Intervention:
        """Skip the data about a spike that was found.

        Raises:
            DataError: There is no checkpoint from before it.
        """
        number = attempt(self.done, spike.onset, self.guard.near_steps)
        widen = rung(self.guard.widen, number)
        chosen, why = self._choose(spike.onset, round(self.guard.rollback_steps * widen), checkpoint)
        last = spike.onset + max(spike.duration, 1) - 1
        skipped = window(
            chosen.data_step,
            self.skip.data_step(spike.onset),
            self.skip.data_step(last),
            round(self.guard.skip_steps * widen),
        )
        what = f"{spike.kind} of the loss from {spike.level:.4g} at step {spike.onset}, {spike.duration} steps long"
        return self._repair(what, spike.kind, spike.onset, chosen, why, [skipped], number, changes)

    def without_data(
        self, windows: Sequence[tuple[int, int]], changes: Changes, checkpoint: int | None = None
    ) -> Intervention:
        """Skip data steps that the user names, inclusive.

        Raises:
            ConfigError: These are no windows.
            DataError: There is no checkpoint from before them.
        """
        wanted = SkipWindows(windows)
        first = wanted.windows[0][0]
        onset = bisect_left(range(1, first + 1), first, key=self.skip.data_step) + 1  # the first step they change
        newest = self.candidates[-1] if self.candidates else None
        if newest is not None and newest.data_step < first and checkpoint is None:
            chosen, why = newest, "the newest one, as the data lies ahead of it"
        else:
            chosen, why = self._choose(onset, 0, checkpoint)
        what = "the user names data steps " + ", ".join(f"{first}-{last}" for first, last in wanted.windows)
        number = attempt(self.done, onset, self.guard.near_steps)
        return self._repair(what, "named by the user", onset, chosen, why, list(wanted.windows), number, changes)

    def apply(self, repair: Intervention) -> None:
        """Write a repair into the run, so that it goes on accordingly when it is started again.

        Raises:
            ConfigError: The run is in progress, or cannot be written to.
        """
        facts = repair.model_dump(mode="json", exclude={"time"})
        self._write(self.done.add(repair), repair.rollback_to, "rollback", facts)

    def undo(self) -> Intervention:
        """Take the last repair back; returns it. What was trained since is abandoned.

        Raises:
            ConfigError: There is none, the run is in progress, or cannot be written to.
        """
        if not self.done.items:
            raise ConfigError(f"{self.directory.path}: nothing to undo, the run has no interventions")
        last = self.done.items[-1]
        self._write(self.done.undone(), None, "undo", {"by": "user", "id": last.id})
        return last

    def command(self) -> list[str]:
        """What starts the run again."""
        starts = [event for event in self.directory.ledger.read() if event.get("event") in ("start", "resume")]
        ranks = starts[-1].get("ranks", 1) if starts else 1
        more = ["--ranks", str(ranks)] if ranks > 1 else []
        return ["megatron-stable", "pretrain", "--config", str(self.directory.config), *more]

    def _choose(self, onset: int, rollback_steps: int, step: int | None) -> tuple[Candidate, str]:
        there = ", ".join(str(candidate.step) for candidate in self.candidates) or "none"
        if step is not None:
            named = next((candidate for candidate in self.candidates if candidate.step == step), None)
            if named is None:
                raise DataError(f"{self.directory.path} has no usable checkpoint of step {step}; it has {there}")
            return named, "named by the user"
        chosen = choose(self.candidates, onset, rollback_steps)
        if chosen is None:
            raise DataError(
                f"{self.directory.path} has no usable checkpoint from before step {onset}; it has {there}: "
                "start the run anew with data.skip set, or bring back an earlier checkpoint from a backup"
            )
        return chosen

    def _repair(
        self,
        what: str,
        rule: str,
        onset: int,
        chosen: Candidate,
        why: str,
        windows: list[tuple[int, int]],
        number: int,
        changes: Changes,
    ) -> Intervention:
        rate, clip = changes.learning_rate_factor, changes.clip_factor
        return Intervention(
            id=new_id(),
            time=now(),
            by="user",
            rule=rule,
            onset=onset,
            rollback_to=chosen.step,
            windows=tuple(windows),
            learning_rate_factor=rung(self.guard.learning_rate_factors, number) if rate is None else rate,
            clip_factor=rung(self.guard.clip_factors, number) if clip is None else clip,
            reset_loss_scale=changes.reset_loss_scale and self.config.precision.dtype == "fp16",
            reason=f"{what}; checkpoint {chosen.step}: {why}",
        )

    def _write(self, now_done: Interventions, latest: int | None, event: str, facts: dict[str, Any]) -> None:
        directory = self.directory
        step = self.entries[-1].step if self.entries else 0
        with directory.held(), explain_os_errors("write", directory.path):
            now_done.write(directory.path)
            self.done = now_done
            usable = [entry.step for entry in store.entries(directory.checkpoints) if entry.usable]
            if usable:
                store.point_latest(directory.checkpoints, usable[-1] if latest is None else latest)
            directory.log(event, step, **facts)
