"""The training loop: step, evaluate, record, save, stop when asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_stable.checkpoint import loader, store
from megatron_stable.checkpoint.format import stored_config
from megatron_stable.checkpoint.health import Retention
from megatron_stable.checkpoint.saver import Saver
from megatron_stable.config.schema import Config
from megatron_stable.data import (
    Batches,
    SkipWindows,
    Tokenizer,
    check_tokenizer,
    check_vocabulary,
    open_dataset,
)
from megatron_stable.engine.engine import Engine
from megatron_stable.engine.shards import (
    local_shards,
    loss_scaler_state,
    optimizer_steps,
    refresh,
    reset_loss_scaler,
    set_loss_scaler_state,
    set_optimizer_steps,
    vector_shards,
)
from megatron_stable.errors import ConfigError, DataError, DivergenceError, LossScaleError, MegatronStableError
from megatron_stable.optim.schedule import learning_rate
from megatron_stable.parallel.agreement import StopSignal, together
from megatron_stable.parallel.topology import Topology
from megatron_stable.records.directory import RunDirectory, differences, refuse_other_model
from megatron_stable.stability.interventions import Interventions
from megatron_stable.stability.recovery import Trouble
from megatron_stable.training.callbacks import Callbacks, Record, strict
from megatron_stable.training.flops import flops_per_token, peak_flops
from megatron_stable.training.watch import FLOOR, Watch, explain_floor


class Trainer:
    """A run in progress. Collective: every rank constructs it and calls its methods.

    Args:
        config: The run, with the vocabulary size known.
        topology: The grid of ranks.
        directory: Where it writes.
        report: Called on rank 0 with lines for the user.
        tokenizer: The data must have been made with it; ``None``: of unknown origin.

    Raises:
        MegatronStableError: On all ranks alike: the data cannot be used.
    """

    def __init__(
        self,
        config: Config,
        topology: Topology,
        directory: RunDirectory,
        report: Callable[[str], None],
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.config, self.topology, self.directory, self.report = config, topology, directory, report
        self.step = 0  # the last one that was trained
        self.watch = Watch(config, directory, report, topology.rank)
        with together():
            self.train_data = self._batches(config.data.train)
            self.validation_data = self._batches(config.data.validation) if config.data.validation else None
            for data in filter(None, (self.train_data, self.validation_data) if topology.rank == 0 else ()):
                assert config.model.vocab_size is not None
                if tokenizer:
                    check_tokenizer(data, tokenizer)
                check_vocabulary(data, config.model.vocab_size)
        self.engine = Engine(config, topology)
        self.engine.set_guard(lambda metrics: self.watch.judge(self.step, metrics))
        guard, kept = config.guard, config.checkpoint
        back = [round(guard.rollback_steps * widen) for widen in (guard.widen if guard.mode == "recover" else (1.0,))]
        retention = Retention(kept.keep, kept.keep_every, tuple(back), kept.healthy_after)
        self.saver = Saver(directory.checkpoints, retention, report)
        self.bad_steps: list[int] = []  # with a bad verdict, the latest
        self._follow(SkipWindows(), 0)
        self.tokens_per_step = config.batch.global_size * config.model.sequence_length
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
        entry = loader.choose(self.directory.checkpoints, self.report)
        shared: list[Interventions | None] = [None]
        with together():
            if self.topology.rank == 0:
                shared = [Interventions.read(self.directory.path)]
        dist.broadcast_object_list(shared, src=0)
        if entry is None:
            self.watch.interventions = shared[0] or Interventions()
            self._follow(SkipWindows(), 0)
            return {}
        assert entry.manifest is not None
        with together():
            changed = differences(stored_config(entry.directory, entry.manifest), self.config)
            refuse_other_model(changed, f"{entry.directory} is of another model")
            # a checkpoint that was brought here from another run's directory brings them along
            self.watch.interventions = shared[0] or store.written_under(entry.manifest)
        self._load(entry)
        self.report(f"resumed from {entry.directory} (step {self.step})")
        return changed

    def _load(self, entry: store.Entry) -> None:
        """Make the run what a checkpoint says it was, but for the interventions made since. Collective."""
        assert entry.manifest is not None
        engine, module, manifest = self.engine.deepspeed, self.engine.module, entry.manifest
        shards = local_shards(engine, module) + vector_shards(engine, module)
        with together():
            incomplete = loader.load_shards(entry.directory, manifest, shards)
            try:
                self._restore(manifest.state, store.written_under(manifest))
            except (KeyError, TypeError, ValueError, OverflowError, ConfigError) as error:
                raise DataError(f"{entry.directory}: its manifest's state is not usable ({error!r})") from None
        for shard in incomplete:
            self.engine.optimizer.restart(shard.flat)
        if incomplete:
            self.report(
                f"moments start at zero where optimizer.name {self.config.optimizer.name} keeps others than before"
            )
        refresh(engine)
        self.step = manifest.step

    def _restore(self, state: dict[str, Any], before: Interventions) -> None:
        engine, precision = self.engine.deepspeed, self.config.precision
        set_optimizer_steps(engine, int(state["optimizer_steps"]))
        if message := self.engine.optimizer.load_state_values(state.get("optimizer")):
            self.report(message)
        later = self.watch.interventions.since(before.items) or ()
        if precision.dtype == "fp16":
            if any(item.reset_loss_scale for item in later):
                reset_loss_scaler(engine, precision)
            elif state["loss_scaler"] is not None:
                set_loss_scaler_state(engine, state["loss_scaler"])
        self.bad_steps = [int(step) for step in state.get("bad_steps", [])]
        if self.watch.guard is not None:
            try:
                self.watch.guard.load(state.get("guard"))
            except (KeyError, TypeError, ValueError) as error:
                self.watch.guard.load(None)
                self.report(f"the guard's statistics start anew: those of the checkpoint do not fit ({error!r})")
        self._follow(SkipWindows(state["skip_windows"]), int(state["data_step"]))

    def _follow(self, trained: SkipWindows, position: int) -> None:
        """Do what the configuration and the interventions say from data step ``position`` on."""
        config, interventions = self.config, self.watch.interventions
        ahead = SkipWindows([*config.data.skip, *interventions.skip.windows])
        self.skip = trained.continued(position, ahead)
        batch = config.batch
        self._train_batches = Batches(
            self.train_data, batch.global_size, batch.micro_size, self.skip, config.model.vocab_size
        )
        self.engine.set_clip_factor(interventions.clip_factor)

    def run(self, callbacks: Callbacks, stop: StopSignal) -> str | None:
        """Train to ``run.steps``.

        Args:
            callbacks: Told of each step that is logged; none on ranks other than 0.
            stop: Ends the run early, after the step in progress and a checkpoint.

        Returns:
            The signal that ended it ("SIGTERM"; "a signal" on a rank that received none), or ``None`` at the end.

        Raises:
            DivergenceError, LossScaleError: On all ranks alike: the run cannot go on.
            MegatronStableError: On all ranks alike: the last checkpoint could not be written.
            DataError: On this rank alone: the data is not what it was.
        """
        config = self.config
        if self.step == 0 and config.guard.mode == "recover":
            self.save()  # there is always something to go back to
        stop.ask()
        clock, stopped, saved, rewound = _Clock(), stop.agreed(), self.step, False
        while self.step < config.run.steps and not stopped:
            self.step += 1
            stop.ask()
            rate = learning_rate(config, self.step) * self.watch.interventions.learning_rate_factor
            self.engine.faults.begin(self.skip.data_step(self.step))
            self.engine.train_step(self.step, self._micro_batches(self._train_batches, self.step), rate)
            stopped = stop.agreed()
            trouble = self._look_back()
            last = self.step == config.run.steps
            evaluates = self.validation_data is not None and (self.step % config.evaluation.every == 0 or last)
            if self.step % config.logging.every == 0 or evaluates or last or stopped or trouble or rewound:
                line = self._record(rate, clock)
                if evaluates:
                    with clock.paused():
                        line |= self._evaluate()
                callbacks.record(line)
            rewound = trouble is not None  # the step after it is recorded, too, and so supersedes what went before
            if trouble is not None:
                self._recover(trouble)
                callbacks.rewind(self.step)
                clock, saved = _Clock(), self.step
            elif self.step % config.checkpoint.every == 0:
                with clock.paused():
                    self.save()
                saved = self.step
        if saved != self.step:
            self.save()
        self.saver.finish()
        return (stop.received or "a signal") if stopped else None

    def _look_back(self) -> Trouble | None:
        """What the guard and the loss scale say of the step that was just made."""
        step, trouble, judgement = self.step, None, self.watch.judgement
        data_step = self.skip.data_step(step)
        if judgement is not None:
            for event, facts in judgement.events:
                self.watch.tell(event, step, data_step=data_step, **facts)
            trouble = judgement.trouble
        if self.watch.bad:
            self.bad_steps = [*self.bad_steps, step][-1000:]
        if self.engine.loss_scale_exhausted:
            diagnosis = self.engine.diagnose(step, lambda: self._micro_batches(self._train_batches, step))
            reason = explain_floor(diagnosis, self.config.precision.min_scale, step, data_step)
            scale = self.config.precision.min_scale
            found = {"module": diagnosis.module, "norms": diagnosis.norms}
            self.watch.tell("loss_scale_floor", step, data_step=data_step, scale=scale, **found)
            storm = self.watch.guard.overflows if self.watch.guard is not None else 1
            trouble = Trouble(FLOOR, step - storm + 1, step, reason)
        return trouble

    def _recover(self, trouble: Trouble) -> None:
        """Go back to an earlier checkpoint and on from there with other data, or end the run. Collective.

        Raises:
            DivergenceError, LossScaleError: On all ranks alike: the run may not go back, or not again.
        """
        self.saver.wait()
        self._judge_checkpoints()
        damaged: set[int] = set()
        while True:
            repair = self.watch.plan(trouble, self.skip, damaged) if self.config.guard.mode == "recover" else None
            if repair is None:
                self._end(trouble)
            entry = loader.choose(self.directory.checkpoints, self.report, at_most=repair.rollback_to)
            if entry is not None and entry.step == repair.rollback_to:
                break
            damaged.add(repair.rollback_to)
        self.watch.commit(repair, self.step)
        self._load(entry)

    def _end(self, trouble: Trouble) -> NoReturn:
        """Save everything, leave the run at a checkpoint from before the trouble if it may go back, and end it."""
        try:
            self.save()
            self.saver.finish()
        except MegatronStableError as failure:  # it must not hide why the run ends
            self.report(f"warning: {failure}")
        remedies = "lower optimizer.learning_rate, choose a recipe that bounds the logits (model.recipe=qk_norm_cap)"
        if self.config.guard.mode == "recover":
            stands = self.watch.give_up(trouble, self.step)
            where = (
                "there is no checkpoint to go back to" if stands is None else f"the run stands at step {stands} again"
            )
            text = f"{trouble.reason}\n{self.watch.tried()}\n{where}; {remedies}"
        else:
            text = f"{trouble.reason}\nguard.mode=recover goes back and skips the data; or {remedies}"
        floor = trouble.rule == FLOOR
        error = LossScaleError(f"{text}, or set precision.dtype=bf16") if floor else DivergenceError(text)
        self.watch.tell("stop", self.step, exit_code=error.exit_code, reason=trouble.reason)
        error.agreed = True
        raise error

    def _judge_checkpoints(self) -> None:
        if self.topology.rank == 0:
            try:
                settings = self.config.checkpoint
                store.judge_all(self.directory.checkpoints, self.step, self.bad_steps, settings.healthy_after)
                self.directory.tell()
            except (OSError, MegatronStableError) as error:
                self.report(f"warning: {self.directory.path}: health and logbook cannot be recorded: {error}")

    def save(self) -> None:
        """Judge the earlier checkpoints, and start writing one of the last step. Collective."""
        self._judge_checkpoints()
        topology, engine = self.topology, self.engine.deepspeed
        layout = {
            "tensor": topology.tensor_size,
            "pipeline": topology.pipeline_size,
            "data": topology.data_size,
            "zero_stage": self.config.parallel.zero_stage,
            "dtype": self.config.precision.dtype,
        }
        state = {
            "optimizer_steps": optimizer_steps(engine),
            "optimizer": self.engine.optimizer.state_values(),
            "loss_scaler": loss_scaler_state(engine),
            "skip_windows": self.skip.to_list(),
            "data_step": self.skip.data_step(self.step) if self.step else 0,
            "bad_steps": self.bad_steps,
            "interventions": self.watch.interventions.to_list(),
            "guard": self.watch.guard.state() if self.watch.guard is not None else None,
        }
        shards = local_shards(engine, self.engine.module) + vector_shards(engine, self.engine.module)
        self.saver.save(self.step, shards, layout, self.config.model_dump(mode="json"), state)

    def _record(self, rate: float, clock: _Clock) -> Record:
        metrics = self.engine.metrics()  # on all ranks: it is collective
        steps, seconds = clock.lap(self.step)
        speed = steps * self.tokens_per_step / seconds if steps else None
        line: dict[str, Any] = {
            "step": self.step,
            "loss": strict(metrics.loss),
            "z_loss": strict(metrics.z_loss),
            "grad_norm": strict(metrics.grad_norm),
            "learning_rate": rate,
            "loss_scale": metrics.loss_scale,
            "tokens": self.step * self.tokens_per_step,
            "tokens_per_second": speed,
            "skipped": metrics.skipped,
            "data_step": self.skip.data_step(self.step),
        }
        if self.watch.judgement is not None:
            line |= {f"{name}_score": strict(score) for name, score in self.watch.judgement.scores.items()}
        if self.config.loss.mu_loss:
            line["mu_loss"] = strict(metrics.mu_loss)
        if self.peak and speed:
            line["mfu"] = speed / self.peak
        return line

    def _evaluate(self) -> Record:
        assert self.validation_data is not None
        batch, evaluation = self.config.batch, self.config.evaluation
        batches = Batches(
            self.validation_data, batch.global_size, batch.micro_size, vocab_size=self.config.model.vocab_size
        )
        loss = self.engine.evaluate(self._micro_batches(batches, n) for n in range(1, evaluation.batches + 1))
        perplexity = float(torch.tensor(loss, dtype=torch.float64).exp())
        return {"validation_loss": strict(loss), "validation_perplexity": strict(perplexity)}

    def _micro_batches(self, batches: Batches, step: int) -> Iterator[Tensor]:
        """This replica's micro batches ``[micro, s + 1]`` of a step."""
        topology = self.topology
        return map(torch.from_numpy, batches.micro_batches(step, topology.data_rank, topology.data_size))

    def _batches(self, source: str | dict[str, float] | None) -> Any:
        if source is None:
            raise ConfigError(
                "data.train is not set: name the prefix of a .bin/.idx dataset; `megatron-stable preprocess` makes one"
            )
        return open_dataset(source, self.config.model.sequence_length, self.config.run.seed)


class _Clock:
    """Time spent training between records, without evaluation and saving."""

    def __init__(self) -> None:
        self.mark: tuple[int, float] | None = None

    def lap(self, step: int) -> tuple[int, float]:
        """(steps, seconds) since the last call; (0, 0) at the first, whose step warms up."""
        now, mark = time.perf_counter(), self.mark
        self.mark = (step, now)
        return (step - mark[0], now - mark[1]) if mark else (0, 0.0)

    def paused(self) -> _Pause:
        return _Pause(self)


class _Pause:
    def __init__(self, clock: _Clock) -> None:
        self.clock = clock

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.clock.mark is not None:
            step, time_ = self.clock.mark
            self.clock.mark = (step, time_ + time.perf_counter() - self.began)
