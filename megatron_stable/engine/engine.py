"""One training engine over DeepSpeed's two: ``DeepSpeedEngine`` for one pipeline stage, ``PipelineEngine`` for more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import inf

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from megatron_stable.config.parametrization import model_multipliers
from megatron_stable.config.schema import Config
from megatron_stable.engine.deepspeed_config import deepspeed_config
from megatron_stable.engine.diagnosis import Diagnosis, diagnose
from megatron_stable.engine.faults import Faults
from megatron_stable.engine.pipeline import TransformerPipeline, even_groups
from megatron_stable.engine.shards import flats, gradients, loss_scaler_state, segments, set_loss_scaler_state
from megatron_stable.model import sigma
from megatron_stable.model.loss import language_model_loss
from megatron_stable.model.peaks import Peaks
from megatron_stable.model.transformer import Transformer, layer_list
from megatron_stable.optim.optimizer import Optimizer
from megatron_stable.optim.segments import Partition
from megatron_stable.parallel.parameters import place
from megatron_stable.parallel.random import seed_step
from megatron_stable.parallel.topology import Topology
from megatron_stable.parallel.world import quiet

MicroBatches = Iterable[
    Tensor
]  # each [micro, s + 1] int64: inputs are all but the last token, targets all but the first


UNDERSCALE = 2.0**-12  # of the loss scale at which fp16 overflows


@dataclass(frozen=True)
class StepMetrics:
    """What a step has to say, over all ranks. Reading it syncs with the device, so it is made only when asked for.

    Attributes:
        loss: Mean cross-entropy, nats per token, without the terms below.
        z_loss, mu_loss: Coefficients included.
        grad_norm: Global L2 norm of the gradient before clipping; infinite where the update was dropped.
        loss_scale: fp16's loss scale, else 1.
        skipped: Whether the update was not made: gradients were not finite, or the guard said no.
    """

    loss: float
    z_loss: float
    mu_loss: float
    grad_norm: float
    loss_scale: float
    skipped: bool


class Engine:
    """A model on its ranks, ready to train. Collective: every rank of the run constructs it and calls each method.

    Args:
        config: The run; ``config.model.vocab_size`` must be known.
        topology: The grid of ranks.
    """

    def __init__(self, config: Config, topology: Topology) -> None:
        assert config.model.vocab_size is not None
        self.config, self.topology = config, topology
        self.device = torch.device(get_accelerator().current_device_name())
        self.vocab_size = config.model.vocab_size
        self.accumulation = config.batch.global_size // (config.batch.micro_size * topology.data_size)
        self._sums = torch.zeros(3, device=self.device)  # the parts of the loss, summed over micro batches
        layers = layer_list(
            config.model, topology.tp, config.run.seed, self.device.type, multipliers=model_multipliers(config)
        )
        pipelined = topology.pipeline_size > 1
        with quiet():
            model = TransformerPipeline(layers, topology, self._loss) if pipelined else Transformer(layers)
            with even_groups(model, config, topology) if pipelined else nullcontext():
                self.optimizer = Optimizer(model.parameters(), config)
                self.deepspeed, *_ = deepspeed.initialize(
                    model=model,
                    optimizer=self.optimizer,
                    config=deepspeed_config(config, topology.data_size),
                    mpu=None if pipelined else topology,
                    dist_init_required=False,
                )
        self.optimizer.bind(
            flats(self.deepspeed),
            Partition(segments(self.deepspeed, self.module), topology.stage_group, topology.tensor_rank),
            lambda: self.deepspeed.optimizer._global_grad_norm,
            topology.pipeline_group,
        )
        self._peaks: Peaks | None = None
        if config.optimizer.qk_clip is not None:
            peaks = Peaks(self.module, config.model.heads // topology.tensor_size, self.device)
            self._peaks, self.optimizer.max_logits = peaks, lambda: peaks.reduce(topology.data_group)
        self.faults = Faults(topology.rank)
        self.faults.watch(self.module)
        self._guard: Callable[[StepMetrics], bool] | None = None
        self._metrics: StepMetrics | None = None  # of the last step, if the guard has asked for them
        self.loss_scale_exhausted = False  # whether the last step overflowed at the lowest loss scale
        if loss_scaler_state(self.deepspeed) is not None:
            self.deepspeed.optimizer.loss_scaler.raise_error_at_min_scale = False  # `loss_scale_exhausted` says so
        output = "embedding.weight" if config.model.tied_embeddings else "head.weight"
        self._output = next((weight for weight in self.module.parameters() if place(weight).name == output), None)

    @property
    def module(self) -> nn.Module:
        """The layers on this rank."""
        module: nn.Module = self.deepspeed.module
        return module

    def set_guard(self, guard: Callable[[StepMetrics], bool]) -> None:
        """Ask ``guard`` once per step, on every rank with the same metrics, whether the update is to be made.

        Where gradients were not finite it is told, and its answer makes no difference.
        """
        self._guard, self.optimizer.guard = guard, self._ask

    def set_clip_factor(self, factor: float) -> None:
        """Clip gradients at ``factor`` times what the configuration says."""
        limit = self.config.optimizer.clip_grad * factor
        if self.config.optimizer.clipping == "global_norm":
            self.deepspeed.optimizer.clip_grad = limit
        else:
            self.optimizer.set_clip(limit)

    def train_step(self, step: int, micro_batches: MicroBatches, learning_rate: float) -> None:
        """One optimizer step on this rank's part of the global batch.

        Args:
            step: Optimizer step, from 1.
            micro_batches: ``accumulation`` micro batches ``[micro, s + 1]`` of token ids on the CPU, the same on
                all ranks of a replica.
            learning_rate: Of this step.
        """
        self._metrics, scaler = None, loss_scaler_state(self.deepspeed)
        self.optimizer.begin_step(learning_rate)
        seed_step(self.config.run.seed, step, self.topology)
        sigma.power_iteration(self.module)
        if self._peaks is not None:
            self._peaks.reset()
        self._sums.zero_()
        if self.topology.pipeline_size > 1:
            self.deepspeed.train_batch(self._pairs(micro_batches))
        else:
            self.deepspeed.train()
            for inputs, targets in self._pairs(micro_batches):
                self.deepspeed.backward(self._loss(self.deepspeed(inputs), targets))
                self.deepspeed.step()
        if self._guard is not None and self._metrics is None:  # DeepSpeed made no update, and so asked nobody
            self._guard(self.metrics())
        self.loss_scale_exhausted = self.overflow and scaler is not None and self._at_floor(scaler)

    def diagnose(self, step: int, micro_batches: Callable[[], MicroBatches]) -> Diagnosis:
        """Replay a step without its update, and see where it first goes wrong. Collective.

        Args:
            micro_batches: Called for those of the step, each time it is replayed.
        """
        known, scaler = (self.metrics(), self.loss_scale_exhausted), loss_scaler_state(self.deepspeed)
        guard = self._guard, self.optimizer.guard
        self._guard, self.optimizer.guard = None, lambda norm: False

        def replay(factor: float) -> Diagnosis:
            scale = factor * scaler["cur_scale"] if scaler else 1.0
            if scaler:
                set_loss_scaler_state(self.deepspeed, {**scaler, "cur_scale": scale})
            return diagnose(self.module, self.topology, lambda: self.train_step(step, micro_batches(), 0.0), scale)

        try:
            found = replay(1.0)
            if scaler and None in found.norms.values():  # a smaller scale shows how large they are
                found = found._replace(norms=replay(UNDERSCALE).norms)
            return found
        finally:
            self._guard, self.optimizer.guard = guard
            self._metrics, self.loss_scale_exhausted = known
            if scaler:
                set_loss_scaler_state(self.deepspeed, scaler)

    def metrics(self) -> StepMetrics:
        """Of the last training step. Collective; costs one small reduction and one sync with the device, if the guard
        has not paid for them."""
        if self._metrics is None:
            self._metrics = self._measure(float(self.deepspeed.optimizer._global_grad_norm), self._sums.new_zeros(()))
        return self._metrics

    def _measure(self, norm: float, fault: Tensor) -> StepMetrics:
        """``fault`` is not zero where this rank knows of a gradient that is not finite. Collective."""
        first, share = self.topology.rank == 0, self.topology.data_size * self.topology.tensor_size
        sums = (self._sums if self.topology.last_stage else torch.zeros_like(self._sums)).double()
        # one word for all ranks: the norm that rank 0 knows
        norms = sums.new_full((1,), norm * share if first else 0.0)
        values = torch.cat([sums / self.accumulation, norms, fault.double().view(1)])
        dist.all_reduce(values)
        loss, z_loss, mu_loss, norm, faults = (values / share).tolist()
        scale = float(self.deepspeed.optimizer.loss_scaler.loss_scale) if self.config.precision.dtype == "fp16" else 1.0
        return StepMetrics(loss, z_loss, mu_loss, inf if faults else norm, scale, self.overflow)

    @property
    def overflow(self) -> bool:
        """Whether gradients of the last step were not finite; all ranks agree."""
        return bool(getattr(self.deepspeed.optimizer, "overflow", False))

    def _ask(self, norm: float) -> bool:
        """The optimizer's question, before anything changes.

        Unless there is a loss scale, DeepSpeed judges gradients by their norm, which leaves out what TP ranks but the
        first hold of replicated parameters: a NaN there would go into that rank's weights unseen. So these ranks look
        at their gradients.
        """
        assert self._guard is not None
        fault = self._sums.new_zeros(())
        if self.topology.tensor_rank > 0:
            fault = ~torch.stack([grad.sum() for grad in gradients(self.deepspeed)]).isfinite().all()
        metrics = self._measure(norm, fault)
        taken = self._guard(metrics)
        self._metrics = replace(metrics, skipped=metrics.skipped or not taken)
        return taken

    def _at_floor(self, scaler: dict[str, float]) -> bool:
        """Whether an overflow cannot lower the loss scale, by its state before the step."""
        spent = scaler["cur_hysteresis"] == 1 or self.config.precision.hysteresis == 1
        return spent and scaler["cur_scale"] <= self.config.precision.min_scale

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatches]) -> float:
        """Mean cross-entropy over global batches, nats per token. Collective."""
        sums, count = torch.zeros((), device=self.device), 0
        sigma.measure(self.module)
        for micro_batches in batches:
            self._sums.zero_()
            if self.topology.pipeline_size > 1:
                self.deepspeed.eval_batch(self._pairs(micro_batches), bcast_loss=False, reduce_output=None)
            else:
                self.deepspeed.eval()
                for inputs, targets in self._pairs(micro_batches):
                    self._loss(self.deepspeed(inputs), targets)
            sums += self._sums[0]
            count += self.accumulation
        self.deepspeed.train()
        return float(self._average(sums / max(count, 1)))

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        losses = language_model_loss(
            logits,
            targets,
            self.topology.tp,
            self.vocab_size,
            self.config.loss.z_loss,
            self.config.model.final_logit_cap,
            self.config.loss.mu_loss,
            self._output,
        )
        self._sums += torch.stack([part.detach() for part in losses])
        return self.faults.loss(sum(losses[1:], start=losses[0]), self._sums)

    def _pairs(self, micro_batches: MicroBatches) -> Iterator[tuple[Tensor, Tensor]]:
        for tokens in micro_batches:
            tokens = tokens.to(self.device, non_blocking=True)
            yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def _average(self, value: Tensor) -> Tensor:
        """Mean over the replicas of a value that the last stage knows, made known to all ranks."""
        value = value.clone() if self.topology.last_stage else torch.zeros_like(value)
        # TP ranks agree already, so the sum over the whole world counts each replica TP times
        dist.all_reduce(value)
        return value / (self.topology.data_size * self.topology.tensor_size)
