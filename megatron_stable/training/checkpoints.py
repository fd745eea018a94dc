"""The checkpoints of a run in progress: write them, judge them, go back to them, look through their eyes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from megatron_stable.checkpoint import loader, store
from megatron_stable.checkpoint.health import Retention
from megatron_stable.checkpoint.saver import Saver
from megatron_stable.checkpoint.state import Layout, RunState
from megatron_stable.checkpoint.store import Entry
from megatron_stable.config.schema import Config
from megatron_stable.engine.engine import Engine
from megatron_stable.errors import DataError, MegatronStableError
from megatron_stable.parallel.agreement import decided, together
from megatron_stable.records.callbacks import Callbacks
from megatron_stable.records.directory import RunDirectory
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
        self.config, self.engine, self.directory, self.report = config, engine, directory, callbacks.message
        self.root, self.rank = directory.checkpoints, engine.topology.rank
        guard, kept = config.guard, config.checkpoint
        back = [round(guard.rollback_steps * widen) for widen in (guard.widen if guard.mode == "recover" else (1.0,))]
        retention = Retention(kept.keep, kept.keep_every, tuple(back), kept.healthy_after)
        self.saver = Saver(self.root, retention, self.report)
        self.bad_steps: list[int] = []
        self.saved = 0

    def due(self, step: int) -> bool:
        """Whether one is to be written after a step."""
        return step % self.config.checkpoint.every == 0

    def note(self, step: int, bad: bool) -> None:
        """Remember the verdict on a step; those with a bad one are no sign of health."""
        if bad:
            self.bad_steps = [*self.bad_steps, step][-BAD_STEPS:]

    def save(self, step: int, state: RunState) -> None:
        """Judge the earlier ones, and start writing one of the last step."""
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
        self.saved = step

    def judge(self, step: int) -> None:
        """Pass verdicts on those that are due one by now, and bring the logbook up to date."""
        if self.rank == 0:
            try:
                store.judge_all(self.root, step, self.bad_steps, self.config.checkpoint.healthy_after)
                self.directory.tell()
            except (OSError, MegatronStableError) as error:
                self.report(f"warning: {self.directory.path}: health and logbook cannot be recorded: {error}")

    def newest(self, at_most: int | None = None) -> Entry | None:
        """The newest one that is whole, of ``at_most`` that step."""
        return loader.choose(self.root, self.report, at_most)

    def load(self, entry: Entry, made: Interventions) -> RunState:
        """Make weights, moments and the engine's own state those of a checkpoint; returns what else it holds.

        Args:
            made: The run's; one that the checkpoint does not know yet may reset the loss scale.

        Raises:
            DataError: On all ranks alike: it is damaged.
        """
        assert entry.manifest is not None
        with together():
            incomplete = loader.load_shards(entry.directory, entry.manifest, self.engine.shards())
        state = entry.manifest.state
        later = made.since(state.interventions) or ()
        scaler = None if any(item.reset_loss_scale for item in later) else state.loss_scaler
        for message in self.engine.restore(state.optimizer_steps, state.optimizer, scaler):
            self.report(message)
        if incomplete:  # after that, as Adam's bias correction starts anew with its moments
            self.engine.restart(incomplete)
            self.report(
                f"moments start at zero where optimizer.name {self.config.optimizer.name} keeps others than before"
            )
        self.engine.refresh()
        self.saved, self.bad_steps = entry.step, list(state.bad_steps)
        return state

    @contextmanager
    def weights_before(self, onset: int) -> Iterator[int | None]:
        """Within, the model has the weights of the newest healthy checkpoint from before a step; yields its step.

        ``None``: there is none that can be read, and the weights are those at hand. What is loaded goes through the
        masters, which are copied to the host first, so that it works alike under every ZeRO stage, and bit for bit.
        """
        self.saver.wait()
        step = decided(lambda: self._healthy_before(onset))
        entry = self.newest(at_most=step) if step is not None else None
        if entry is None or entry.step != step or entry.manifest is None:
            yield None
            return
        weights = [replace(s, tensors={"weight": s.tensors["weight"]}) for s in self.engine.shards()]
        kept = [state.tensors["weight"].to("cpu", copy=True) for state in weights]
        try:
            try:
                with together():
                    loader.load_shards(entry.directory, entry.manifest, weights)
            except DataError as error:
                self.report(f"warning: the checkpoint of step {step} cannot be asked: {error}")
                step = None
            else:
                self.engine.refresh()
            yield step
        finally:
            with torch.no_grad():
                for state, weight in zip(weights, kept, strict=True):
                    state.tensors["weight"].copy_(weight)
            self.engine.refresh()

    def _healthy_before(self, onset: int) -> int | None:
        """On rank 0."""
        healthy = [each for each in store.candidates(store.entries(self.root)) if each.healthy is not False]
        found = choose([each for each in healthy if each.step < onset], onset, 0)
        return found and found[0].step
