"""One training engine over DeepSpeed's two: ``DeepSpeedEngine`` for one pipeline stage, ``PipelineEngine`` for more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from megatron_stable.config.parametrization import model_multipliers
from megatron_stable.config.schema import Config
from megatron_stable.engine.deepspeed_config import deepspeed_config
from megatron_stable.engine.pipeline import TransformerPipeline
from megatron_stable.engine.shards import flats, segments
from megatron_stable.errors import ConfigError
from megatron_stable.model import sigma
from megatron_stable.model.loss import language_model_loss
from megatron_stable.model.transformer import Transformer, layer_list
from megatron_stable.optim.optimizer import Optimizer
from megatron_stable.optim.segments import Partition
from megatron_stable.parallel.agreement import together
from megatron_stable.parallel.parameters import place
from megatron_stable.parallel.random import seed_step
from megatron_stable.parallel.topology import Topology
from megatron_stable.parallel.world import quiet

MicroBatches = Iterable[
    Tensor
]  # each [micro, s + 1] int64: inputs are all but the last token, targets all but the first


@dataclass(frozen=True)
class StepMetrics:
    """What a step has to say, over all ranks. Reading it syncs with the device, so it is made only when asked for.

    Attributes:
        loss: Mean cross-entropy, nats per token, without the terms below.
        z_loss, mu_loss: Coefficients included.
        grad_norm: Global L2 norm of the gradient before clipping; infinite where the update was dropped.
        loss_scale: fp16's loss scale, else 1.
        skipped: Whether DeepSpeed dropped the update because of non-finite gradients.
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
            self.optimizer = Optimizer(model.parameters(), config)
            if pipelined:
                self._refuse_uneven_groups()
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
        output = "embedding.weight" if config.model.tied_embeddings else "head.weight"
        self._output = next((weight for weight in self.module.parameters() if place(weight).name == output), None)

    @property
    def module(self) -> nn.Module:
        """The layers on this rank."""
        module: nn.Module = self.deepspeed.module
        return module

    def train_step(self, step: int, micro_batches: MicroBatches, learning_rate: float) -> None:
        """One optimizer step on this rank's part of the global batch.

        Args:
            step: Optimizer step, from 1.
            micro_batches: ``accumulation`` micro batches ``[micro, s + 1]`` of token ids on the CPU, the same on
                all ranks of a replica.
            learning_rate: Of this step.
        """
        self.optimizer.begin_step(learning_rate)
        seed_step(self.config.run.seed, step, self.topology)
        sigma.power_iteration(self.module)
        self._sums.zero_()
        if self.topology.pipeline_size > 1:
            self.deepspeed.train_batch(self._pairs(micro_batches))
            return
        self.deepspeed.train()
        for inputs, targets in self._pairs(micro_batches):
            self.deepspeed.backward(self._loss(self.deepspeed(inputs), targets))
            self.deepspeed.step()

    def metrics(self) -> StepMetrics:
        """Of the last training step. Collective; costs one small reduction and one sync with the device."""
        skipped = bool(getattr(self.deepspeed.optimizer, "overflow", False))
        norm = self.deepspeed.get_global_grad_norm()
        loss, z_loss, mu_loss = self._average(self._sums / self.accumulation).tolist()
        scale = float(self.deepspeed.optimizer.loss_scaler.loss_scale) if self.config.precision.dtype == "fp16" else 1.0
        return StepMetrics(loss, z_loss, mu_loss, float(norm), scale, skipped)

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

    def _refuse_uneven_groups(self) -> None:
        """Except under bf16, DeepSpeed sums the gradient norm over the stages once per parameter group.

        Stages with different numbers of groups would wait for each other for ever.
        """
        counts: list[int] = [0] * self.topology.world
        dist.all_gather_object(counts, len(self.optimizer.param_groups))
        dtype = self.config.precision.dtype
        with together():
            if dtype != "bf16" and len(set(counts)) > 1:
                raise ConfigError(
                    f"parallel.pipeline {self.topology.pipeline_size} with precision.dtype {dtype}: optimizer.name, "
                    "no_decay or parametrization treat embedding or head unlike the blocks, which gives the stages "
                    f"{min(counts)} to {max(counts)} parameter groups; use precision.dtype bf16, or parallel.pipeline 1"
                )

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
        return sum(losses[1:], start=losses[0])

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
