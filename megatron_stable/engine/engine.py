"""One training engine over DeepSpeed's two: ``DeepSpeedEngine`` for one pipeline stage, ``PipelineEngine`` for more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from math import inf, isfinite
from typing import Any, Generic

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from megatron_stable.config.schema import Config
from megatron_stable.engine.construction import DTYPES, training_layers
from megatron_stable.engine.deepspeed_config import deepspeed_config
from megatron_stable.engine.diagnosis import Diagnosis, diagnose
from megatron_stable.engine.faults import Faults
from megatron_stable.engine.loss_scaler import LateUpdate, LossScalerState
from megatron_stable.engine.outcome import J, Outcome, Refused, StepMetrics
from megatron_stable.engine.pipeline import TransformerPipeline, even_groups
from megatron_stable.engine.probes import Probes
from megatron_stable.engine.reduction import (
    FullPrecision,
    HalfPrecision,
    ReducingOptimizer,
    counts,
    spare_unscaling,
    sum_partial_first,
)
from megatron_stable.engine.schedule import Schedule
from megatron_stable.engine.shards import (
    ShardState,
    flats,
    gradients,
    local_shards,
    loss_scaler_state,
    refresh,
    reset_loss_scaler,
    set_loss_scaler_state,
    shard_states,
)
from megatron_stable.engine.unpromised import require_engine, require_pipeline
from megatron_stable.model import sigma
from megatron_stable.model.documents import DocumentMask
from megatron_stable.model.loss import language_model_loss
from megatron_stable.model.peaks import Peaks
from megatron_stable.model.transformer import Transformer
from megatron_stable.optim.clipping_state import ClippingState
from megatron_stable.optim.optimizer import Optimizer
from megatron_stable.optim.partition import Partition
from megatron_stable.parallel.parameters import place
from megatron_stable.parallel.random import seed_step
from megatron_stable.parallel.topology import Topology
from megatron_stable.parallel.world import quiet

# each [micro, s + 1] int64: inputs are all but the last token, targets all but the first; under
# data.repetition_filter, samples that are read and not predicted come as their complements, below 0
MicroBatches = Iterable[Tensor]
UNDERSCALE = 2.0**-12  # of the loss scale at which fp16 overflows


class Engine:
    """A model on its ranks, ready to train. Collective: every rank of the run constructs it and calls each method.

    Args:
        config: The run; ``config.model.vocab_size`` must be known.
        topology: The grid of ranks.
        draw: Whether to draw the initial weights; else :meth:`shards` are to be filled, then :meth:`refresh` called.
    """

    def __init__(self, config: Config, topology: Topology, draw: bool = True) -> None:
        assert config.model.vocab_size is not None
        self.config, self.topology = config, topology
        self.device = torch.device(get_accelerator().current_device_name())
        self.vocab_size = config.model.vocab_size
        self.accumulation = config.batch.global_size // (config.batch.micro_size * topology.data_size)
        self._filtered = config.data.repetition_filter is not None
        # the parts of the loss, summed over micro batches; of filtered ones also the share that is predicted
        self._sums = torch.zeros(4 if self._filtered else 3, device=self.device)
        self._filled = draw  # whether the weights are anything
        settings = deepspeed_config(config, topology.data_size)
        layers = training_layers(config, topology, settings, self.device.type, draw)
        pipelined = topology.pipeline_size > 1
        if pipelined:
            require_pipeline()
        with quiet(config.logging.verbosity == "debug"):
            model = TransformerPipeline(layers, topology, self._loss) if pipelined else Transformer(layers)
            with even_groups(model, config, topology) if pipelined else nullcontext():
                self.optimizer = Optimizer(model.parameters(), config)
                self.deepspeed, *_ = deepspeed.initialize(
                    model=model,
                    optimizer=self.optimizer,
                    config=settings,
                    mpu=None if pipelined else topology,
                    dist_init_required=False,
                )
        require_engine(self.deepspeed, self.module)
        self.documents: DocumentMask | None = None
        if config.data.document_mask:
            assert config.data.end_of_document is not None
            self.documents = DocumentMask(self.module, config.model, config.data.end_of_document, self.device)
        self.schedule: Schedule | None = None
        if pipelined:
            all_read = self.documents is not None
            self.schedule = Schedule(self.deepspeed, topology, self._stream(), self.accumulation, all_read)
        shards = local_shards(self.deepspeed, self.module)
        held = [(weight, s) for weight, s in zip(self.module.parameters(), shards, strict=True) if s.numel]
        if config.precision.dtype == "bf16" and config.parallel.zero_stage == 1:
            HalfPrecision.take_over(self.deepspeed, held, topology)
        if config.precision.dtype == "fp32" and config.parallel.zero_stage == 1 and not pipelined:
            FullPrecision.take_over(self.deepspeed, held, topology)
        sum_partial_first(self.deepspeed, held, topology)
        spare_unscaling(self.deepspeed)
        self._gammas = {s.place.name: s.of(s.flat) for s in shards if s.numel and s.place.name.endswith(".gamma")}
        self.optimizer.bind(
            flats(self.deepspeed),
            Partition(shards, topology.stage_group, topology.tensor_rank),
            self._global_norm,
            topology.pipeline_group,
        )
        self.probes: Probes | None = None
        if config.logging.probes_every:
            counted = {shard.place.name for weight, shard in held if counts(weight, topology)}
            self.probes = Probes(config, topology, self.module, self.optimizer, counted, self.device)
        self._peaks: Peaks | None = None
        if config.optimizer.qk_clip is not None:
            peaks = Peaks(self.module, config.model.heads // topology.tensor_size, self.device)
            self._peaks, self.optimizer.max_logits = peaks, lambda: peaks.reduce(topology.data_group)
        self.faults = Faults(topology.rank)
        self.faults.watch(self.module)
        self._late: LateUpdate | None = None
        if loss_scaler_state(self.deepspeed) is not None:
            scaler = self.deepspeed.optimizer.loss_scaler
            scaler.raise_error_at_min_scale = False  # the step's outcome says so
            self._late = LateUpdate(scaler)
        output = "embedding.weight" if config.model.tied_embeddings else "head.weight"
        self._output = next((weight for weight in self.module.parameters() if place(weight).name == output), None)

    @property
    def module(self) -> nn.Module:
        """The layers on this rank."""
        module: nn.Module = self.deepspeed.module
        return module

    def set_clip_factor(self, factor: float) -> None:
        """Clip gradients at ``factor`` times what the configuration says."""
        self.optimizer.set_clip(self.config.optimizer.clip_grad * factor)

    def train_step(
        self,
        step: int,
        micro_batches: MicroBatches,
        learning_rate: float,
        approve: Callable[[StepMetrics], J] | None = None,
        wish: Callable[[], bool] = lambda: False,
        measured: bool = False,
        histograms: bool = False,
    ) -> Outcome[J]:
        """One optimizer step on this rank's part of the global batch.

        Args:
            step: Optimizer step, from 1.
            micro_batches: ``accumulation`` micro batches ``[micro, s + 1]`` of token ids on the CPU, the same on
                all ranks of a replica.
            learning_rate: Of this step.
            approve: Asked once, on every rank with the same metrics, before anything changes: the update is made if
                its judgement has ``take``. Where gradients were not finite none is made in any case. ``None``: every
                update is made.
            wish: Asked when the step is measured: whether this rank wishes to stop. All learn it with the metrics.
            measured, histograms: Whether the probes measure it, and make histograms; the same on all ranks.
        """
        if not self._filled:
            raise RuntimeError("the engine was made without weights (draw=False), and none have been loaded")
        scaler = loss_scaler_state(self.deepspeed)
        approval = _Approval(self, approve, wish, scaler.cur_scale if scaler else 1.0)
        self.optimizer.begin_step(learning_rate, approval)
        seed_step(self.config.run.seed, step, self.topology)
        sigma.follow_masters(self.module, self._gammas, self.topology.data_group)
        sigma.power_iteration(self.module)
        if self.probes is not None:
            self.probes.begin(measured, histograms)
        if self._peaks is not None:
            self._peaks.reset()
        self._sums.zero_()
        if self.schedule is not None:
            self.schedule.train(self._pairs(micro_batches))
        else:
            self.deepspeed.train()
            for inputs, targets in self._pairs(micro_batches):
                self.deepspeed.backward(self._loss(self.deepspeed(inputs), targets))
                self.deepspeed.step()
        if not approval.asked:  # DeepSpeed found gradients that are not finite
            approval(torch.tensor(inf))
        if self._late is not None:
            self._late.catch_up()
        if self.probes is not None:
            self.probes.end(step)
        exhausted = not approval.finite and scaler is not None and self._at_floor(scaler)
        return Outcome(approval.metrics, approval.judgement, exhausted)

    def diagnose(self, step: int, micro_batches: Callable[[], MicroBatches]) -> Diagnosis:
        """Replay a step without its update, and see where it first goes wrong. Collective.

        Args:
            micro_batches: Called for those of the step, each time it is replayed.
        """
        scaler = loss_scaler_state(self.deepspeed)

        def replay(factor: float) -> Diagnosis:
            scale = factor * scaler.cur_scale if scaler else 1.0
            if scaler:
                set_loss_scaler_state(self.deepspeed, scaler.model_copy(update={"cur_scale": scale}))
            again = partial(self.train_step, step, micro_batches(), 0.0, lambda metrics: Refused())
            return diagnose(self.module, self.topology, again, scale)

        try:
            found = replay(1.0)
            if scaler and None in found.norms.values():  # a smaller scale shows how large they are
                found = found._replace(norms=replay(UNDERSCALE).norms)
            return found
        finally:
            if scaler:
                set_loss_scaler_state(self.deepspeed, scaler)

    def _measure(self, norm: Tensor, loss_scale: float, wish: Callable[[], bool]) -> StepMetrics:
        """What the last step has to say. Collective; its one read from the device is here."""
        first, share = self.topology.rank == 0, self.topology.data_size * self.topology.tensor_size
        sums = (self._sums if self.topology.last_stage else torch.zeros_like(self._sums)).double()
        norm = norm.to(sums) * share
        # one word for all ranks: the norm that rank 0 knows
        known = norm if first else torch.zeros_like(norm)
        wishes = torch.full_like(norm, wish())
        values = torch.stack([*(sums / self.accumulation), known, self._fault(), wishes])
        dist.all_reduce(values)
        loss, z_loss, mu_loss, *predicted, total, found, stop = (values / share).tolist()
        kept = predicted[0] if predicted else 1.0
        if 0 < kept < 1:  # of the tokens that are predicted
            loss, z_loss = loss / kept, z_loss / kept
        finite = isfinite(total) and not found
        grad_norm = total if finite else inf
        return StepMetrics(loss, z_loss, mu_loss, grad_norm, loss_scale, not finite, stop > 0, 1 - kept)

    def _global_norm(self) -> Tensor:
        """Of the step's gradient, unscaled; infinite where it is no number."""
        norm = torch.as_tensor(self.deepspeed.optimizer._global_grad_norm)
        return torch.where(norm >= 0, norm, inf)

    def _fault(self) -> Tensor:
        """Not zero where this rank holds a gradient that is not finite and that DeepSpeed does not look at.

        Unless there is a loss scale, DeepSpeed judges gradients by their norm, which leaves out what TP ranks but the
        first hold of replicated parameters: a NaN there would go into that rank's weights unseen. So these ranks look
        at their gradients, unless our own norm has.
        """
        seen = self.topology.tensor_rank == 0 or isinstance(self.deepspeed.optimizer, ReducingOptimizer)
        held = [] if seen else [grad.sum() for grad in gradients(self.deepspeed)]
        return (~torch.stack(held).isfinite().all()).double() if held else self._sums.new_zeros((), dtype=torch.float64)

    def _at_floor(self, scaler: LossScalerState) -> bool:
        """Whether an overflow cannot lower the loss scale, by its state before the step."""
        spent = scaler.cur_hysteresis == 1 or self.config.precision.hysteresis == 1
        return spent and scaler.cur_scale <= self.config.precision.min_scale

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatches]) -> list[float]:
        """Mean cross-entropy of each global batch, nats per token; forward only, without dropout. Collective."""
        losses: list[Tensor] = []
        sigma.follow_masters(self.module, self._gammas, self.topology.data_group)
        sigma.measure(self.module)
        for micro_batches in batches:
            self._sums.zero_()
            if self.schedule is not None:
                self.schedule.evaluate(self._pairs(micro_batches))
            else:
                self.deepspeed.eval()
                for inputs, targets in self._pairs(micro_batches):
                    self._loss(self.deepspeed(inputs), targets)
            losses.append(self._sums / self.accumulation)
        self.deepspeed.train()
        if not losses:
            return []
        loss, _, _, *predicted = self._average(torch.stack(losses)).unbind(1)
        # of a batch that is left out whole, 0, as of a step
        return (loss / predicted[0].where(predicted[0] > 0, 1.0) if predicted else loss).tolist()

    def shards(self) -> list[ShardState]:
        """What this rank holds of weights and moments, as views."""
        return shard_states(self.deepspeed, self.module)

    def refresh(self) -> None:
        """Make the model's weights what the masters say, on all ranks. Collective."""
        refresh(self.deepspeed)
        self._filled = True

    def close(self) -> None:
        """Let go of the model: DeepSpeed's hooks on gradients hold it where Python's collector does not look."""
        with quiet():
            self.deepspeed.destroy()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the engine beside shards: fields of ``RunState``. Collective."""
        return {
            "optimizer_steps": self.optimizer.updates,
            "moments_from": self.optimizer.moments_from,
            "optimizer": self.optimizer.clipping_state(),
            "loss_scaler": loss_scaler_state(self.deepspeed),
        }

    def restore(
        self,
        optimizer_steps: int,
        moments_from: int,
        optimizer: ClippingState | None,
        loss_scaler: LossScalerState | None,
        whole: bool = True,
    ) -> list[str]:
        """Go on from what :meth:`state` returned; without ``loss_scaler`` the loss scale begins anew, and so do all
        moments if those of the shards are not ``whole``, on any rank.

        Returns:
            Messages for the user.
        """
        messages = []
        self.optimizer.set_updates(optimizer_steps, moments_from)
        if not whole:  # all, as Adam's bias correction is that of a group
            self.optimizer.restart()
            messages.append(
                f"moments start at zero: optimizer.name {self.config.optimizer.name} keeps others than before"
            )
        if self.config.precision.dtype == "fp16":
            if loss_scaler is None:
                reset_loss_scaler(self.deepspeed, self.config.precision)
            else:
                set_loss_scaler_state(self.deepspeed, loss_scaler)
        if message := self.optimizer.load_clipping_state(optimizer):
            messages.append(message)
        return messages

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        predicted = targets >= 0 if self._filtered else None
        losses = language_model_loss(
            logits,
            targets if predicted is None else read(targets),
            self.topology.tp,
            self.vocab_size,
            self.config.loss.z_loss,
            self.config.model.final_logit_cap,
            self.config.loss.mu_loss,
            self._output,
            self.probes.activations.see_logits if self.probes is not None else None,
            predicted,
        )
        parts = [part.detach() for part in losses]
        self._sums += torch.stack(parts if predicted is None else [*parts, predicted.float().mean()])
        return self.faults.loss(sum(losses[1:], start=losses[0]), self._sums)

    def _pairs(self, micro_batches: MicroBatches) -> Iterator[tuple[Tensor, Tensor]]:
        for tokens in micro_batches:
            if self.documents is not None:
                self.documents.announce(read(tokens[:, :-1]))
            tokens = tokens.to(self.device, non_blocking=True)
            inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            yield read(inputs) if self._filtered else inputs, targets

    def _stream(self) -> Tensor:
        """Like what pipeline stages hand on: ``[b, s, h]``, under SP ``[b, s/tp, h]``."""
        model, shards = self.config.model, self.topology.tensor_size if self.topology.tp.sequence_sharded else 1
        shape = self.config.batch.micro_size, model.sequence_length // shards, model.hidden
        return torch.empty((), dtype=DTYPES[self.config.precision.dtype], device=self.device).expand(shape)

    def _average(self, value: Tensor) -> Tensor:
        """Mean over the replicas of a value that the last stage knows, made known to all ranks."""
        value = value.clone() if self.topology.last_stage else torch.zeros_like(value)
        # TP ranks agree already, so the sum over the whole world counts each replica TP times
        dist.all_reduce(value)
        return value / (self.topology.data_size * self.topology.tensor_size)


def read(tokens: Tensor) -> Tensor:
    """Token ids, whether they are predicted, or handed on as their complements because they are not."""
    return tokens.maximum(~tokens)


class _Approval(Generic[J]):
    """The question whether a step's update may be made, on its way through DeepSpeed to the optimizer.

    Args:
        approve: Whom it is for; ``None``: only gradients that are not finite stand against it.
        wish: Whether this rank wishes to stop.
        loss_scale: That the step's gradients are multiplied with.
    """

    def __init__(
        self,
        engine: Engine,
        approve: Callable[[StepMetrics], J] | None,
        wish: Callable[[], bool],
        loss_scale: float,
    ) -> None:
        self.engine, self.approve, self.wish, self.loss_scale = engine, approve, wish, loss_scale
        self.asked, self.finite = False, True
        self.judgement: J | None = None
        self.metrics: Callable[[], StepMetrics]

    def __call__(self, norm: Tensor) -> bool:
        """The optimizer's question, before anything changes; ``norm`` is that of the whole gradient."""
        self.asked = True
        if self.approve is None:
            self.finite = bool(norm.isfinite())
            self.metrics = partial(self.engine._measure, norm, self.loss_scale, self.wish)
            return self.finite
        metrics = self.engine._measure(norm, self.loss_scale, self.wish)
        self.finite, self.judgement = not metrics.skipped, self.approve(metrics)
        taken = self.finite and self.judgement.take
        self.metrics = lambda: replace(metrics, skipped=not taken)
        return taken
