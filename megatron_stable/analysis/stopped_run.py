"""Intervene in a stopped run by hand: find the spike, choose checkpoint and data to skip, apply, undo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_stable.analysis.lead import settings_for
from megatron_stable.analysis.series import Series, read_series
from megatron_stable.checkpoint import store
from megatron_stable.checkpoint.store import Shelf
from megatron_stable.config.load import load_config
from megatron_stable.config.schema import GuardConfig
from megatron_stable.data.course import Course
from megatron_stable.data.skip import SkipWindows, merged
from megatron_stable.errors import ConfigError, DataError
from megatron_stable.files import explain_os_errors
from megatron_stable.records.directory import RunDirectory, require_known_format, require_run
from megatron_stable.records.interventions import read_interventions, write_interventions
from megatron_stable.stability.detector import Spike, find_spikes
from megatron_stable.stability.events import Event, Rollback, Shift, Start, Undo
from megatron_stable.stability.interventions import Intervention, Interventions
from megatron_stable.stability.recovery import Candidate, attempt, choose, new_id, now, rung, window

NEAR = 20  # steps before a rise, as found in the curve, in which what the guard found is the same


@dataclass(frozen=True)
class Changes:
    """What else to change; ``None``: what the run's ladder (``guard.*_factors``) says for this attempt.

    Raises ConfigError for a factor that is none.
    """

    learning_rate_factor: float | None = None
    clip_factor: float | None = None
    reset_loss_scale: bool = True

    def __post_init__(self) -> None:
        for name in ("learning_rate_factor", "clip_factor"):
            factor = getattr(self, name)
            if factor is not None and not 0 < factor <= 1:
                raise ConfigError(f"{name.replace('_', '-')} {factor:g}: give a number above 0 and up to 1")


class Seen(NamedTuple):
    """A spike or divergence in a run's curve.

    Attributes:
        spike: In steps.
        data_steps: Its first and last data step, as they were counted then.
        samples: [first, end), as they were trained on.
        settled: Why nothing is left to be done about it; ``None``: something is.
    """

    spike: Spike
    data_steps: tuple[int, int]
    samples: tuple[int, int]
    settled: str | None


class StoppedRun:
    """A run that is not in progress.

    Raises:
        ConfigError: It is no run's directory.
        DataError: Its checkpoints or interventions cannot be used.
    """

    def __init__(self, run: str | Path) -> None:
        self.directory = RunDirectory(run)
        require_run(run)
        require_known_format(self.directory.path)
        self.config = load_config(self.directory.config)
        self.guard: GuardConfig = self.config.guard
        self._look()

    def _look(self) -> None:
        """See where the run stands: its interventions and checkpoints, and the course that it would take."""
        shelf = Shelf(self.directory.checkpoints)
        manifests = [entry.manifest for entry in shelf.entries() if entry.usable and entry.manifest is not None]
        own = read_interventions(self.directory.path)
        self.candidates = shelf.candidates()
        self.done = own or Interventions(manifests[-1].state.interventions if manifests else ())
        size = self.config.batch.global_size
        trained = manifests[-1].state.course if manifests else Course.begin(size)
        self.course = trained.resumed(self.stands_at, size, self.config.data.skip, self.done.skip)

    @property
    def stands_at(self) -> int:
        """The step of the checkpoint that it goes on from; 0: from the start."""
        return self.candidates[-1].step if self.candidates else 0

    def spikes(self, source: Path | None = None, tag: str | None = None) -> tuple[Series, list[Seen]]:
        """The loss, and its spikes, rises and divergences, as the run's guard would find them.

        Args:
            source: Where to read it, in place of the run's own records.
            tag: Its name there; guessed if not given.

        Raises:
            DataError, ConfigError: See :func:`read_series`.
        """
        series = read_series(source or self.directory.path, tag)
        found = find_spikes(series.steps.tolist(), series.values.tolist(), settings_for(series.name, self.guard))
        recorded = series
        if series.data_steps is None and self.directory.metrics.is_file():
            recorded = read_series(self.directory.path)
        return series, [self._seen(spike, recorded) for spike in found]

    def _seen(self, spike: Spike, recorded: Series) -> Seen:
        last = spike.onset + max(spike.duration, 1) - 1
        data_steps = [recorded.data_step(step) or self.course.data_step(step) for step in (spike.onset, last)]
        now = self.course.samples(spike.onset)[0].start, self.course.position(last)
        samples = (recorded.batch(spike.onset) or now)[0], (recorded.batch(last) or now)[1]
        settled = None
        if samples[0] in self.course.windows:
            settled = "its data is skipped already"
        elif samples[0] != now[0]:
            settled = "the run takes other data there by now"
        elif any(event.onset in range(spike.onset - NEAR, last + 1) for event in self._shifts()):
            settled = "the data changed there, by the guard's second opinion"
        return Seen(spike, (data_steps[0], data_steps[1]), samples, settled)

    def _shifts(self) -> list[Shift]:
        return [event for event in self.directory.ledger.read() if isinstance(event, Shift)]

    def after_spike(self, seen: Seen, changes: Changes, checkpoint: int | None = None) -> Intervention:
        """Skip the data about a spike that was found.

        Raises:
            ConfigError: It is settled, or the checkpoint that is named is from after it.
            DataError: There is no checkpoint from before it.
        """
        spike = seen.spike
        if seen.settled:
            raise ConfigError(f"the {spike.kind} at step {spike.onset}: {seen.settled}; to choose anew, --undo that")
        number = self._attempt(spike.onset)
        widen = rung(self.guard.widen, number)
        chosen, why = self._choose(spike.onset, round(self.guard.rollback_steps * widen), checkpoint)
        length = round(self.guard.skip_steps * widen)
        data_steps = self.course.data_steps(*seen.samples)
        skipped = window(chosen.data_step, *data_steps, length)
        what = f"{spike.kind} of the loss from {spike.level:.4g} at step {spike.onset}, {spike.duration} steps long"
        why += f"; window: {length} data steps about data step {data_steps[0]}"
        why += f", and on to the last of it, {skipped[1]}" if skipped[1] - skipped[0] >= length else ""
        return self._intervention(what, spike.kind, spike.onset, chosen, why, [skipped], number, changes)

    def without_data(
        self, windows: Sequence[tuple[int, int]], changes: Changes, checkpoint: int | None = None
    ) -> Intervention:
        """Skip data steps that the user names, inclusive.

        Raises:
            ConfigError: These are no windows, or all skipped already, or the checkpoint is from after them.
            DataError: There is no checkpoint from before them.
        """
        wanted, skip = merged(windows), self.course.windows
        named = ", ".join(f"{first}-{last}" for first, last in wanted)
        samples = [self.course.stretch(*window) for window in wanted]
        if SkipWindows([*skip.stretches, *samples]) == skip:
            raise ConfigError(f"data steps {named} are skipped already")
        onset = self.course.step(skip.sample(skip.kept(samples[0][0])))  # the first step that they change
        assert onset is not None
        if checkpoint is None and self.candidates and self.stands_at < onset:
            chosen, why = self.candidates[-1], "the newest one, as the data lies ahead of it"
        else:
            chosen, why = self._choose(onset, 0, checkpoint)
        number = self._attempt(onset)
        what = f"the user names data steps {named}"
        return self._intervention(what, "named by the user", onset, chosen, why, list(wanted), number, changes)

    def apply(self, intervention: Intervention) -> list[int]:
        """Write an intervention into the run, so that it goes on accordingly when it is started again.

        Returns:
            The steps of the checkpoints that are abandoned by it.

        Raises:
            ConfigError: The run is in progress, or cannot be written to.
        """
        return self._write(self.done.add(intervention), Rollback.of(intervention, self.stands_at))

    def undo(self) -> tuple[Intervention, list[int]]:
        """Take the last intervention back; what was trained since is abandoned.

        Returns:
            The intervention, and the steps of the checkpoints that are abandoned.

        Raises:
            ConfigError: There is none, the run is in progress, or cannot be written to.
        """
        if not self.done.items:
            raise ConfigError(f"{self.directory.path}: nothing to undo, the run has no interventions")
        last = self.done.items[-1]
        if last.changes:
            raise ConfigError(
                f"{self.directory.path}: the last intervention is surgery, which cannot be undone; to go on without "
                "it, move the checkpoint of before_surgery/ into checkpoints/ of a new run.directory"
            )
        return last, self._write(self.done.undone(), Undo(step=self.stands_at, by="user", id=last.id))

    def command(self) -> list[str]:
        """What starts the run again, on this machine."""
        starts = [event for event in self.directory.ledger.read() if isinstance(event, Start)]
        ranks = starts[-1].ranks if starts else 1
        moved = Path(self.config.run.directory).resolve() != self.directory.path.resolve()
        more = ["--ranks", str(ranks)] if ranks > 1 else []
        more += [f"run.directory={self.directory.path}"] if moved else []
        return ["megatron-stable", "pretrain", "--config", str(self.directory.config), *more]

    def _attempt(self, onset: int) -> int:
        """The rung of the ladder: after what the guard has tried there, whether or not it gave up then."""
        tried = Interventions(tuple(item for item in self.done.items if item.windows))
        return attempt(tried, onset, self.guard.near_steps)

    def _choose(self, onset: int, rollback_steps: int, step: int | None) -> tuple[Candidate, str]:
        there = ", ".join(str(candidate.step) for candidate in self.candidates) or "none"
        before = [candidate for candidate in self.candidates if candidate.step < onset]
        if step is not None:
            if step not in (candidate.step for candidate in self.candidates):
                raise DataError(f"{self.directory.path} has no usable checkpoint of step {step}; it has {there}")
            if step >= onset:
                raise ConfigError(f"the checkpoint of step {step} has trained on that data: name one before {onset}")
            return next(candidate for candidate in before if candidate.step == step), "named by the user"
        chosen = choose(before, onset, rollback_steps)
        if chosen is None:
            raise DataError(
                f"{self.directory.path} has no usable checkpoint from before step {onset}; it has {there}: "
                "start the run anew with data.skip set, or bring back an earlier checkpoint from a backup"
            )
        return chosen

    def _intervention(
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
        factors, reason = {}, f"{what}; checkpoint {chosen.step}: {why}"
        for name, ladder in (("learning_rate", "learning_rate_factors"), ("clip", "clip_factors")):
            given = getattr(changes, f"{name}_factor")
            factor = rung(getattr(self.guard, ladder), number) if given is None else given
            factors[f"{name}_factor"] = factor
            if given is not None or factor != 1:
                source = "named by the user" if given is not None else f"attempt {number} here, guard.{ladder}"
                reason += f"; {name.replace('_', ' ')} x {factor:g}: {source}"
        return Intervention(
            id=new_id(),
            time=now(),
            by="user",
            rule=rule,
            onset=onset,
            rollback_to=chosen.step,
            windows=tuple(windows),
            samples=tuple(self.course.stretch(*window) for window in windows),
            reset_loss_scale=changes.reset_loss_scale and self.config.precision.dtype == "fp16",
            reason=reason,
            **factors,
        )

    def _write(self, done: Interventions, event: Event) -> list[int]:
        directory, before = self.directory, {c.step for c in self.candidates}
        with directory.held(), explain_os_errors("write", directory.path):
            if (read_interventions(directory.path) or self.done) != self.done:
                raise ConfigError(f"{directory.path}: its interventions have changed meanwhile; look again")
            write_interventions(directory.path, done)
            self._look()
            if self.candidates:
                store.point_latest(directory.checkpoints, self.stands_at)
            directory.log(event)
        return sorted(before - {candidate.step for candidate in self.candidates})
