"""The training loop: step, review, evaluate, record, save, stop when asked."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from math import exp, inf
from statistics import fmean
from typing import Any

from megatron_stable.checkpoint import loader
from megatron_stable.checkpoint.format import stored_config
from megatron_stable.checkpoint.state import RunState
from megatron_stable.config.load import replaced
from megatron_stable.config.schema import Config
from megatron_stable.data import Course, Stage, Stages, Tokenizer, unrecorded
from megatron_stable.engine.engine import Engine
from megatron_stable.engine.outcome import Outcome, StepMetrics
from megatron_stable.errors import DataError, DivergenceError, LossScaleError, MegatronStableError
from megatron_stable.numbers import finite
from megatron_stable.optim.schedule import learning_rate
from megatron_stable.parallel.agreement import agreed, decided, everywhere
from megatron_stable.parallel.lifeline import SLOW, Lifeline
from megatron_stable.parallel.topology import Topology
from megatron_stable.records.callbacks import Callbacks
from megatron_stable.records.directory import RunDirectory, differences
from megatron_stable.records.interventions import read_interventions
from megatron_stable.records.metrics import Record
from megatron_stable.records.stages import read_stages
from megatron_stable.stability.events import Blend, LossScaleFloor, Rollback, Stop, Surgery
from megatron_stable.stability.guard import Guard, GuardState, Judgement
from megatron_stable.stability.interventions import Intervention, Interventions
from megatron_stable.stability.recovery import Trouble
from megatron_stable.training.checkpoints import Checkpoints
from megatron_stable.training.clock import Clock
from megatron_stable.training.flops import flops_per_token, peak_flops
from megatron_stable.training.operation import operate, settle
from megatron_stable.training.probing import Probing
from megatron_stable.training.record import record_of
from megatron_stable.training.recovery import FLOOR, Recovery, explain_floor
from megatron_stable.training.second_opinion import second_opinion
from megatron_stable.training.source import Source
from megatron_stable.training.stop import Stopped, StopSignal

# what decides which tokens are predicted, and from which: with another of them losses are no longer comparable
PREDICTED = {"data.document_mask", "data.end_of_document", "data.repetition_filter", "data.repetition_periods"}


class Trainer:
    """A run in progress. Collective: every rank constructs it and calls its methods.

    Args:
        config: The run, with the vocabulary size known.
        topology: The grid of ranks.
        directory: Where it writes.
        callbacks: Told of records and events, and of what else the user should know.
        tokenizer: The data must have been made with it; ``None``: of unknown origin.
        compiles: Whether blocks are compiled, where the configuration leaves it open.

    Attributes:
        operated: The configuration that the run goes on with, by another trainer, once it has operated on itself.

    Raises:
        MegatronStableError: On all ranks alike: the data cannot be used.
    """

    def __init__(
        self,
        config: Config,
        topology: Topology,
        directory: RunDirectory,
        callbacks: Callbacks,
        tokenizer: Tokenizer | None = None,
        compiles: bool = False,
    ) -> None:
        self.config, self.directory, self.callbacks = config, directory, callbacks
        self.step = 0  # the last one that was trained
        self.operated: Config | None = None
        self.source = Source(config, topology, tokenizer)
        if config.model.compile != "auto":
            compiles = config.model.compile
        model = config.model.model_copy(update={"compile": compiles})
        decided = config.model_copy(update={"model": model})
        self.engine = Engine(decided, topology, draw=not loader.any_to_load(directory.checkpoints))
        self.guard = Guard(config.guard, fp16=config.precision.dtype == "fp16")
        self.checkpoints = Checkpoints(config, self.engine, directory, callbacks)
        self.probing = Probing(config.logging, self.engine, callbacks)
        self.recovery = Recovery(config, directory, self.checkpoints.saver.shelf, callbacks)
        peak = peak_flops(config.precision.dtype)
        self.peak = peak and peak * topology.world / flops_per_token(config.model)  # tokens/s at full utilisation

    def resume(self) -> dict[str, list[Any]]:
        """Go on from the newest whole checkpoint of the run directory, if there is one. Collective.

        Returns:
            What differs from the configuration that wrote it, ``{"section.field": [before, now]}``.

        Raises:
            ConfigError: On all ranks alike: it is of another model.
            DataError: On all ranks alike: it is damaged.
        """
        found = self.checkpoints.newest()
        made = decided(lambda: read_interventions(self.directory.path))
        if found is None:
            if made is not None and made.changes:
                raise agreed(
                    DataError,
                    f"{self.directory.path}: no checkpoint of the model that this run has made of its own is usable; "
                    "what it was made of is in before_surgery/",
                )
            self.recovery.interventions = made or Interventions()
            self.source.arrange(None, 0, self.recovery.interventions)
            self._follow(self.source.course, 0)
            self._tell_unreached()
            return {}
        stored, state = stored_config(found.directory, found.manifest), found.manifest.state
        changed = differences(stored, self.config)
        # a checkpoint that was brought here from another run's directory brings them along
        self.recovery.interventions = made or Interventions(state.interventions)
        known = decided(lambda: read_stages(self.directory.path)) or state.stages
        self._go_to(found)
        before = known or decided(lambda: unrecorded(stored.data.train, stored.data.stages))
        sample = self.source.arrange(before, self.step, self.recovery.interventions)
        if before is not None and sample is not None:
            changed |= self._tell_sources(before, sample, changed)
        elif "run.seed" in changed or not self._looks_back:
            self.guard.forget_batches()
        self.callbacks.message(f"resumed from {found.directory} (step {self.step})")
        self._tell_unreached()
        return changed

    def _tell_unreached(self) -> None:
        """Warn of stages that the run does not come to, as whoever counts in steps or tokens has made them."""
        config, steps = self.config, self.config.run.steps
        if self.step < steps and (stages := self.source.unreached(steps)):
            self.callbacks.message(
                f"warning: data.stages: the blend from sample {stages[0].sample} on is not reached, as step {steps}, "
                f"the last, ends before sample {self.source.course.position(steps)}; stages count samples, of "
                f"{config.model.sequence_length} tokens, neither steps nor tokens"
            )

    def _tell_sources(self, before: Stages, sample: int, changed: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Say that the blend has changed from a sample on; what is to be said of it that the configuration's fields do
        not, as it stands in a file that they name."""
        stages = self.source.stages
        assert stages is not None
        self.guard.restore(GuardState())
        self.callbacks.message(
            f"the blend of the data has changed; from sample {sample} on it is {stages.blend(sample).words()}; "
            "the guard's statistics start anew"
        )
        for name, other in stages.come_again(sample).items():
            self.callbacks.message(
                f"warning: source {name} begins anew, and holds what {other} held, which has been read: that comes "
                f"again. Keep {other} as it was, and give what is new as a source of its own"
            )
        if {"data.train", "data.stages"} & changed.keys():
            return {}
        plain = [[[stage.sample, stage.weights] for stage in each.configured] for each in (before, stages)]
        return {"data.train": plain}

    def run(self, stop: StopSignal, lifeline: Lifeline) -> Stopped | None:
        """Train to ``run.steps``.

        Args:
            stop: Ends the run early, after the step in progress and a checkpoint.
            lifeline: Told of what is done, and of what takes long.

        Returns:
            How a signal ended it, or ``None`` at the end, and where it has to go on as ``operated``.

        Raises:
            DivergenceError, LossScaleError: On all ranks alike: the run cannot go on.
            MegatronStableError: On all ranks alike: the last checkpoint could not be written.
            DataError: On this rank alone: the data is not what it was.
        """
        config, clock, rewound, stopped = self.config, Clock(), False, False
        if self.step == 0 and config.guard.mode == "recover":
            with lifeline.slow():
                self.save()  # there is always something to go back to
        while self.step < config.run.steps and not stopped:
            self.step += 1
            for stage in self.source.entered(self.step):
                self._tell_stage(stage)
            with lifeline.step(self.step):
                outcome = self._train_step(stop)
            stop.defer()
            stopped = outcome.metrics.stop  # nobody evaluates any more: who sent the signal may not wait for long
            with clock.paused(), lifeline.slow():
                trouble = self._review(outcome, asks=not stopped)
            ends = stopped or trouble is not None or self.step == config.run.steps
            evaluates = self._evaluates() and not stopped
            due = self.step % config.logging.every == 0 or self.probing.recorded
            if due or evaluates or ends or rewound:
                record = self._record(outcome, clock)
                if evaluates:
                    with clock.paused():
                        record |= self._evaluate(lifeline)
                self.callbacks.record(record)
            self.probing.hand_out(self.step)
            rewound = trouble is not None  # the step after a rollback supersedes what was recorded before it
            if trouble is not None:
                with lifeline.slow():
                    recovered = self._recover(trouble, stop, lifeline)
                if self.operated is not None:
                    return None
                if not recovered:
                    return self._finish(stop, lifeline, saves=False)
                self.probing.rewind(self.step)
                self.callbacks.rewind(self.step)
                clock = Clock()
            elif not stopped and self.checkpoints.due(self.step):
                with clock.paused(), lifeline.slow():
                    self.save()
        return self._finish(stop if stopped else None, lifeline)

    def _finish(self, stop: StopSignal | None, lifeline: Lifeline, saves: bool = True) -> Stopped | None:
        """Save the last step, unless a signal ends the run and the configuration says otherwise. Collective.

        Args:
            saves: Whether it is worth it.
        """
        began = time.monotonic()
        wish = next(filter(None, everywhere(stop.received))) if stop else None
        with lifeline.slow():
            self.checkpoints.saver.wait()
        with lifeline.slow():
            saves = saves and (not wish or wish.saves(self.config.checkpoint.on_signal))
            if saves and self.checkpoints.saved != self.step:
                self.save()
            self.checkpoints.saver.finish()
        return stop.ended(wish, self.step, self.checkpoints.saved, time.monotonic() - began) if stop and wish else None

    @property
    def rate(self) -> float:
        """The learning rate of the step."""
        return learning_rate(self.config, self.step) * self.recovery.interventions.learning_rate_factor

    def _train_step(self, stop: StopSignal) -> Outcome[Judgement]:
        step = self.step

        def approve(metrics: StepMetrics) -> Judgement:
            return self.guard.judge(step, metrics.loss, metrics.grad_norm, metrics.skipped)

        self.engine.faults.begin(self.source.course.data_step(step))
        measured, histograms = self.probing.begin(step), self.probing.histograms(step)
        batches = self.source.step(step)
        return self.engine.train_step(step, batches, self.rate, approve, stop.wished, measured, histograms)

    def _review(self, outcome: Outcome[Judgement], asks: bool) -> Trouble | None:
        """Put on record what a step's outcome says, ask a second opinion where one is wanted; what to recover from.
        Unless it ``asks``, the guard puts its question again later."""
        judgement = outcome.judgement
        assert judgement is not None
        self._tell(judgement)
        trouble, bad = judgement.trouble, judgement.bad
        if asks and judgement.question is not None and trouble is None:
            opinion = second_opinion(judgement.question, self.engine, self.source, self.checkpoints)
            old, recent = ([batch.step for batch in part] for part in (opinion.question.old, opinion.question.recent))
            heard = self.guard.hear(self.step, opinion, self.source.grown(old, recent))
            self._tell(heard)
            trouble, bad = heard.trouble, heard.bad
        self.checkpoints.note(self.step, bad)
        return self._floor() if outcome.loss_scale_exhausted else trouble

    def _tell_stage(self, stage: Stage) -> None:
        """Another blend begins to hold in the step."""
        stages, data_step = self.source.stages, self.source.course.data_step(self.step)
        assert stages is not None
        before = stages.blend(stage.sample - 1)
        self.callbacks.event(
            Blend(
                step=self.step,
                data_step=data_step,
                sample=stage.sample,
                shares=stage.shares,
                added=tuple(name for name in stage.weights if name not in before.weights),
                removed=tuple(name for name in before.weights if name not in stage.weights),
                read=stages.counts(stage.sample),
            )
        )

    def _tell(self, judgement: Judgement) -> None:
        data_step = self.source.course.data_step(self.step)
        for event in judgement.events:
            self.callbacks.event(event.model_copy(update={"data_step": data_step}))
        self.probing.review(self.step, data_step, judgement.events)

    def _floor(self) -> Trouble:
        """The loss scale can fall no lower: see where the step goes wrong."""
        step, data_step, scale = self.step, self.source.course.data_step(self.step), self.config.precision.min_scale
        diagnosis = self.engine.diagnose(step, lambda: self.source.step(step))
        found = {"module": diagnosis.module, "norms": diagnosis.norms}
        floor = LossScaleFloor(step=step, data_step=data_step, scale=scale, **found)
        self.callbacks.event(floor)
        self.probing.review(step, data_step, [floor])
        storm = max(self.guard.overflows, 1)
        return Trouble(FLOOR, step - storm + 1, step, explain_floor(diagnosis, scale, step, data_step))

    def _recover(self, trouble: Trouble, stop: StopSignal, lifeline: Lifeline) -> bool:
        """Go back to an earlier checkpoint and on from there with other data, or end the run. Collective.

        Returns:
            Whether it was done. Else the run is to stop, before surgery that would have taken long: from the last
            checkpoint on it comes to the same trouble again.

        Raises:
            DivergenceError, LossScaleError: On all ranks alike: the run may not go back, or not again.
        """
        self.checkpoints.saver.wait()
        self.checkpoints.judge(self.step)
        damaged: set[int] = set()
        while (intervention := self.recovery.plan(trouble, self.source.course, damaged)) is not None:
            if intervention.changes:
                try:
                    made = self._operate(intervention, stop, lifeline)
                except DataError as error:  # an older one may be sound
                    self.callbacks.message(f"warning: no surgery: {error}")
                    damaged.add(intervention.rollback_to)
                    continue
                except MegatronStableError as error:
                    self.callbacks.message(f"warning: no surgery: {error}")
                    break
                if made is not None:
                    self._become(*made)
                return made is not None
            found = self.checkpoints.of(intervention.rollback_to)
            if found is not None:
                self.recovery.commit(Rollback.of(intervention, self.step), intervention)
                self._go_to(found)
                return True
            damaged.add(intervention.rollback_to)
        raise self._end(trouble, damaged)

    def _operate(
        self, intervention: Intervention, stop: StopSignal, lifeline: Lifeline
    ) -> tuple[Intervention, Surgery] | None:
        """Write a checkpoint of another model. Collective; returns and raises what :func:`operate` does."""
        self.callbacks.message(f"surgery on the checkpoint of step {intervention.rollback_to}: {intervention.reason}")
        return operate(
            self.config, self.directory, intervention, self.recovery.interventions, self.source.course,
            self.source.stages, self.step, lambda: lifeline.progress(SLOW), stop.wished,
        )  # fmt: skip

    def _become(self, made: Intervention, event: Surgery) -> None:
        """Make the run's model another one. Collective; it is decided then, whatever happens."""
        recovery = self.recovery
        if event.verdict == "broken":
            self.callbacks.message("warning: the surgery has cost more than a twentieth of what was learnt")
        recovery.commit(event, made)
        decided(lambda: settle(self.directory, recovery.interventions))
        self.operated = replaced(self.config, recovery.interventions.changes)
        self.callbacks.rewind(made.rollback_to)

    def _end(self, trouble: Trouble, damaged: Collection[int]) -> MegatronStableError:
        """Save everything, and leave the run at a checkpoint from before the trouble if it may go back; why it ends."""
        try:
            self.save()
            self.checkpoints.saver.finish()
        except MegatronStableError as failure:  # it must not hide why the run ends
            self.callbacks.message(f"warning: {failure}")
        remedies = "lower optimizer.learning_rate, choose a recipe that bounds the logits (model.recipe=qk_norm_cap)"
        if self.config.guard.mode == "recover":
            stands = self.recovery.give_up(trouble, self.step, damaged)
            where = (
                "there is no checkpoint to go back to" if stands is None else f"the run stands at step {stands} again"
            )
            text = f"{trouble.reason}\n{self.recovery.tried()}\n{where}; {remedies}"
        else:
            text = f"{trouble.reason}\nguard.mode=recover goes back and skips the data; or {remedies}"
        floor = trouble.rule == FLOOR
        error = LossScaleError(f"{text}, or set precision.dtype=bf16") if floor else DivergenceError(text)
        self.callbacks.event(Stop(step=self.step, exit_code=error.exit_code, reason=trouble.reason))
        error.agreed = True
        return error

    def save(self) -> None:
        """Judge the earlier checkpoints, and start writing one of the last step. Collective."""
        state = RunState(
            **self.engine.state(),
            course=self.source.course,
            stages=self.source.stages,
            bad_steps=tuple(self.checkpoints.bad_steps),
            interventions=self.recovery.interventions.items,
            guard=self.guard.state(),
        )
        self.checkpoints.save(self.step, state)

    def _go_to(self, found: loader.Found) -> None:
        """Make the run what a checkpoint says it was, but for the interventions made since. Collective."""
        state = self.checkpoints.load(found, self.recovery.interventions)
        self.guard.restore(state.guard)
        if other := PREDICTED & differences(stored_config(found.directory, found.manifest), self.config).keys():
            self.guard.restore(GuardState())
            self.callbacks.message(
                f"{' and '.join(sorted(other))} changed, so losses are not comparable with those of before; the "
                "guard's statistics start anew"
            )
        self.step = found.step
        self._follow(state.course, found.step)

    def _follow(self, course: Course, step: int) -> None:
        """Do what the configuration and the interventions say from behind a step of a course."""
        self.source.follow(course, step, self.recovery.interventions)
        if self.source.course.eras[-1].step == step or not self._looks_back:
            self.guard.forget_batches()  # the engine evaluates batches of today's size alone, of what is open
        self.engine.set_clip_factor(self.recovery.interventions.clip_factor)

    @property
    def _looks_back(self) -> bool:
        """Whether all that the guard remembers may be asked about."""
        return not self.guard.memory or self.source.looks_back(self.guard.memory[0].step - 1)

    def _record(self, outcome: Outcome[Judgement], clock: Clock) -> Record:
        steps_per_second = clock.lap(self.step)
        speed = steps_per_second and steps_per_second * self.config.tokens_per_step
        record = record_of(self.step, outcome, self.config, self.source, self.rate, speed)
        if self.peak and speed:
            record["mfu"] = speed / self.peak
        return record | self.probing.record()

    def _evaluates(self) -> bool:
        last = self.step == self.config.run.steps
        return self.source.validates and (last or self.step % self.config.evaluation.every == 0)

    def _evaluate(self, lifeline: Lifeline) -> Record:
        loss = fmean(self.engine.evaluate(lifeline.each(self.source.validation())))
        perplexity = exp(loss) if loss < 700 else inf  # the largest that a float64 holds
        return {"validation_loss": finite(loss), "validation_perplexity": finite(perplexity)}
