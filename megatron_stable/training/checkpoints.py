"""The checkpoints of a run in progress: write them, judge them, go back to them, look through their eyes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from megatron_stable.checkpoint import loader
from megatron_stable.checkpoint.format import stored_config
from megatron_stable.checkpoint.health import Retention
from megatron_stable.checkpoint.loader import Found
from megatron_stable.checkpoint.saver import Saver
from megatron_stable.checkpoint.state import Layout, RunState
from megatron_stable.checkpoint.store import Entry
from megatron_stable.config.schema import Config
from megatron_stable.disk import Damaged
from megatron_stable.engine.engine import Engine
from megatron_stable.engine.shards import ShardState
from megatron_stable.errors import DataError, MegatronStableError
from megatron_stable.parallel.agreement import anywhere, decided
from megatron_stable.records.callbacks import Callbacks
from megatron_stable.records.directory import RunDirectory, differences, refuse_other_model
from megatron_stable.stability.events import Stop
from megatron_stable.stability.interventions import Interventions
from megatron_stable.stability.recovery import choose

BAD_STEPS = 1000  # the latest that are remembered


class Checkpoints:
    """Collective: every rank constructs it and calls its methods.

    Attributes:
        bad_steps: Steps with a bad verdict, the latest.
        saved: The step of the last one that was begun to be written, or that the run went back to.
    """

    def __init__(self, config: Config, engine: Engine, directory: RunDirectory, callbacks: Callbacks) -> None:
        self.config, self.engine, self.directory = config, engine, directory
        self.callbacks, self.report = callbacks, callbacks.message
        self.root, self.rank = directory.checkpoints, engine.topology.rank
        guard, kept = config.guard, config.checkpoint
        back = [round(guard.rollback_steps * widen) for widen in (guard.widen if guard.mode == "recover" else (1.0,))]
        retention = Retention(kept.keep, kept.keep_every, tuple(back), kept.healthy_after)
        self.saver = Saver(self.root, retention, self.report, callbacks.event)
        self.bad_steps: list[int] = []
        self.saved = 0
        self._wanted = False  # one is due, or was while the one before was being written
        self._put_off = 0  # times that the next was due since the last was begun

    def due(self, step: int) -> bool:
        """Whether one is to be written after a step: each that is planned, once the one before it is complete.

        One that does not get complete is waited for in the end, lest training outrun what can be kept.
        """
        planned = step % self.config.checkpoint.every == 0
        self.saver.tell()
        self._wanted = self._wanted or planned
        if self._wanted and not self.saver.idle():
            self._put_off += planned
            waits = self._put_off >= self.config.checkpoint.max_failed_saves
            if planned:
                slow = f"the checkpoint of step {self.saved} is still being written"
                then = "training waits for it" if waits else f"that of step {step} has to wait, training goes on"
                self.report(f"warning: {slow}: {then}")
            return waits
        return self._wanted

    def note(self, step: int, bad: bool) -> None:
        """Remember the verdict on a step; those with a bad one are no sign of health."""
        if bad:
            self.bad_steps = [*self.bad_steps, step][-BAD_STEPS:]

    def save(self, step: int, state: RunState) -> None:
        """Judge the earlier ones, and start writing one of the last step, when the one before is complete.

        Raises:
            MegatronStableError: On all ranks alike: `checkpoint.max_failed_saves` in a row have failed, with this one.
        """
        self.saver.wait()
        self.judge(step)
        topology = self.engine.topology
        layout = Layout(
            tensor=topology.tensor_size,
            pipeline=topology.pipeline_size,
            data=topology.data_size,
            zero_stage=self.config.parallel.zero_stage,
            dtype=self.config.precision.dtype,
        )
        self.saver.save(step, self.engine.shards(), layout, self.config, state)
        self.saved, self._wanted, self._put_off = step, False, 0
        if self.saver.failures + 1 >= self.config.checkpoint.max_failed_saves:
            self._see_it_through(step)

    def _see_it_through(self, step: int) -> None:
        """Wait for a save on which the run depends."""
        try:
            self.saver.finish()
        except MegatronStableError as error:
            self.callbacks.event(Stop(step=step, exit_code=error.exit_code, reason="no checkpoint can be written"))
            raise

    def judge(self, step: int) -> None:
        """Pass verdicts on those that are due one by now, and bring the logbook up to date."""
        if self.rank == 0:
            try:
                self.saver.shelf.judge(step, self.bad_steps, self.config.checkpoint.healthy_after)
                self.directory.tell()
            except (OSError, MegatronStableError) as error:
                self.report(f"warning: {self.directory.path}: health and logbook cannot be recorded: {error}")

    def newest(self) -> Found | None:
        """The newest one that is whole, to be loaded.

        Raises:
            ConfigError: On all ranks alike: it is of another model.
            DataError: On all ranks alike: it cannot be read, or none is whole.
        """
        return loader.choose(self.saver.shelf, self.engine.shards(), self.report, self._require_same_model)

    def of(self, step: int, states: list[ShardState] | None = None) -> Found | None:
        """The one of a step, to be loaded into ``states`` (default: all); ``None``: it cannot be used, as is said."""
        shelf = self.saver.shelf
        entry = decided(lambda: next((each for each in shelf.entries() if each.step == step and each.usable), None))
        if entry is None:
            return None
        try:
            return loader.read(entry, self.engine.shards() if states is None else states)
        except DataError as error:
            self.report(f"warning: passed over the checkpoint of step {step}: {error}")
            if self.rank == 0 and isinstance(error, Damaged):
                loader.note_damage(shelf, entry, str(error), self.report)
            return None

    def load(self, found: Found, made: Interventions) -> RunState:
        """Make weights, moments and the engine's own state those of a checkpoint; returns what else it holds.

        Args:
            made: The run's; one that the checkpoint does not know yet may reset the loss scale.
        """
        whole = not anywhere(not found.fill(self.engine.shards()))
        state = found.manifest.state
        later = made.since(state.interventions) or ()
        scaler = None if any(item.reset_loss_scale for item in later) else state.loss_scaler
        steps, began = state.optimizer_steps, state.moments_from
        for message in self.engine.restore(steps, began, state.optimizer, scaler, whole):
            self.report(message)
        self.engine.refresh()
        self.saved, self.bad_steps, self._wanted = found.step, list(state.bad_steps), False
        return state

    @contextmanager
    def weights_before(self, onset: int) -> Iterator[int | None]:
        """Within, the model has the weights of the newest healthy checkpoint from before a step; yields its step.

        ``None``: there is none that can be read, and the weights are those at hand. What is loaded goes through the
        masters, which are copied to the host first, so that it works alike under every ZeRO stage, and bit for bit.
        """
        self.saver.wait()
        step = decided(lambda: self._healthy_before(onset))
        weights = [replace(s, tensors={"weight": s.tensors["weight"]}) for s in self.engine.shards()]
        found = None if step is None else self.of(step, weights)
        if found is None:
            yield None
            return
        kept = [state.tensors["weight"].to("cpu", copy=True) for state in weights]
        try:
            found.fill(weights)
            self.engine.refresh()
            yield step
        finally:
            with torch.no_grad():
                for state, weight in zip(weights, kept, strict=True):
                    state.tensors["weight"].copy_(weight)
            self.engine.refresh()

    def _require_same_model(self, entry: Entry) -> None:
        assert entry.manifest is not None
        changed = differences(stored_config(entry.directory, entry.manifest), self.config)
        refuse_other_model(changed, f"{entry.directory} is of another model")

    def _healthy_before(self, onset: int) -> int | None:
        """On rank 0."""
        healthy = [each for each in self.saver.shelf.candidates() if each.healthy is not False]
        found = choose([each for each in healthy if each.step < onset], onset, 0)
        return found and found[0].step
