"""Clipping rules: to a fixed global norm, and those that adapt to the run.

Each rule sees the global gradient norm once per step. What scales the whole gradient is handed on, as the fused update
reads each gradient anyway and divides it in passing; what scales parameters apart is applied flat by flat. The fixed
rule stays on the device; those that adapt keep their statistics on the host, which costs them a read per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite, sqrt
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_stable.config.schema import OptimizerConfig
from megatron_stable.optim.adamw import Flat
from megatron_stable.optim.clipping_state import AdaGCState, ClippingState, ZClipState
from megatron_stable.optim.partition import LocalShard, Partition


class Clipping(Protocol):
    """A clipping rule.

    Attributes:
        limit: What it clips the global norm to in any case (in AdaGC's warm-up).
    """

    limit: float

    def observe(self, norm: Tensor) -> None:
        """Take note of this step's global gradient norm, before any of its gradients is scaled."""

    def scale(self, flats: Sequence[Flat], partition: Partition) -> Tensor | float | None:
        """Scale each parameter's gradient in place, where the rule does so. Collective over the pipeline stage.

        Returns:
            What all gradients are still to be divided by, at least 1; a tensor is on the device. ``None``: nothing.
        """

    def state(self) -> ClippingState | None:
        """The statistics; ``None``: there are none. Collective."""

    def load(self, state: ClippingState | None) -> bool:
        """Restore what :meth:`state` returned; whether it could, which takes the state of the same rule."""


class GlobalNorm:
    """Clip the norm of the whole gradient to ``clip_grad`` (arXiv 1211.5063)."""

    def __init__(self, config: OptimizerConfig) -> None:
        self.limit = config.clip_grad or inf
        self.divisor: Tensor | None = None

    def observe(self, norm: Tensor) -> None:
        self.divisor = ((norm + 1e-6) / self.limit).clamp(min=1.0).float() if isfinite(self.limit) else None

    def scale(self, flats: Sequence[Flat], partition: Partition) -> Tensor | None:
        return self.divisor

    def state(self) -> None:
        return None

    def load(self, state: ClippingState | None) -> bool:
        return True


class ZClip:
    """ZClip (arXiv 2504.02507): clip the global norm where its z-score against a moving mean and variance is high.

    With z = (norm - mean) / std above the threshold t, the norm is clipped to mean + t^2 std / z, so that the farther
    out it is, the harder; that bound is what enters the statistics then. Whatever z is, the norm is clipped to
    ``clip_grad`` too. The first ``clipping_warmup`` steps clip to that alone, and their norms start the statistics.
    """

    def __init__(self, config: OptimizerConfig) -> None:
        self.limit = config.clip_grad or inf
        self.threshold = 2.5 if config.clipping_threshold is None else config.clipping_threshold
        self.decay = 0.97 if config.clipping_decay is None else config.clipping_decay
        self.warmup = 25 if config.clipping_warmup is None else config.clipping_warmup
        self.seen: list[float] = []  # norms of the warm-up
        self.mean = self.variance = 0.0
        self.divisor: float | None = None

    def observe(self, norm: Tensor) -> None:
        self._observe(float(norm))

    def _observe(self, norm: float) -> None:
        bound = norm
        if not isfinite(norm):  # whoever lets such a step pass, it must not enter the statistics
            self.divisor = None
            return
        if len(self.seen) < self.warmup:
            self.seen.append(norm)
            self.mean = sum(self.seen) / len(self.seen)
            self.variance = sum((x - self.mean) ** 2 for x in self.seen) / len(self.seen)
        else:
            std = sqrt(self.variance)
            z = (norm - self.mean) / (std + 1e-6)
            if z > self.threshold:
                bound = self.mean + self.threshold**2 * std / z
            self.mean = self.decay * self.mean + (1 - self.decay) * bound
            self.variance = self.decay * self.variance + (1 - self.decay) * (bound - self.mean) ** 2
        bound = min(bound, self.limit)
        self.divisor = (norm + 1e-6) / bound if norm > bound else None

    def scale(self, flats: Sequence[Flat], partition: Partition) -> float | None:
        return self.divisor

    def state(self) -> ZClipState:
        return ZClipState(seen=tuple(self.seen), mean=self.mean, variance=self.variance)

    def load(self, state: ClippingState | None) -> bool:
        if not isinstance(state, ZClipState):
            return False
        self.seen, self.mean, self.variance = list(state.seen), state.mean, state.variance
        return True


class AdaGC:
    """AdaGC (arXiv 2502.11034): clip the norm of each parameter's gradient to a multiple of its own moving mean.

    h = min(1, threshold x gamma / ||g||), then gamma <- decay gamma + (1 - decay) ||h g||. In the first
    ``clipping_warmup`` steps the global norm is clipped to ``clip_grad`` instead, and gamma is the least norm so far.
    A parameter whose gradient has been 0 has no gamma yet and is not clipped: as published, it would stay frozen.

    Sources differ on the defaults: 1.05, 0.98 and 100 steps here, after pytorch_optimizer; elsewhere 1.5, 0.95, 1000.
    """

    def __init__(self, config: OptimizerConfig, pipeline_group: dist.ProcessGroup | None) -> None:
        self.limit = config.clip_grad or inf
        self.threshold = 1.05 if config.clipping_threshold is None else config.clipping_threshold
        self.decay = 0.98 if config.clipping_decay is None else config.clipping_decay
        self.warmup = 100 if config.clipping_warmup is None else config.clipping_warmup
        self.pipeline_group = pipeline_group
        self.steps = 0
        self.divisor = 1.0  # of this step, in the warm-up
        self.names: list[str] = []
        self.gamma: Tensor | None = None  # fp32 [parameters of the stage]; inf: none yet
        self._loaded: dict[str, float | None] = {}

    def observe(self, norm: Tensor) -> None:
        self.steps += 1
        if self.steps <= self.warmup:
            self.divisor = max(1.0, (float(norm) + 1e-6) / self.limit)

    def scale(self, flats: Sequence[Flat], partition: Partition) -> float | None:
        grads = {flat.weight: flat.grad for flat in flats}

        def square(shard: LocalShard) -> Tensor:
            return torch.linalg.vector_norm(shard.of(grads[shard.flat]), dtype=torch.float64).square()

        gamma = self._gammas(partition)
        norms = partition.sums(grads, square).sqrt().float()
        here = norms > 0  # and so in these flats
        if self.steps <= self.warmup:
            self.gamma = torch.where(here, torch.minimum(gamma, norms / self.divisor), gamma)
            return self.divisor
        factors = torch.where(here, (self.threshold * gamma / norms).clamp_max(1.0), 1.0)
        for i, shard in partition.within(grads):
            shard.of(grads[shard.flat]).mul_(factors[i])
        clipped = norms * factors
        moved = torch.where(gamma.isinf(), clipped, self.decay * gamma + (1 - self.decay) * clipped)
        self.gamma = torch.where(here, moved, gamma)
        return None

    def state(self) -> AdaGCState:
        gamma = [] if self.gamma is None else self.gamma.tolist()
        own: dict[str, float | None] = {n: g if isfinite(g) else None for n, g in zip(self.names, gamma, strict=True)}
        stages: list[dict[str, float | None]] = [own]
        if self.pipeline_group is not None:
            stages *= dist.get_world_size(self.pipeline_group)
            dist.all_gather_object(stages, own, group=self.pipeline_group)
        merged = {name: value for stage in stages for name, value in stage.items()}
        return AdaGCState(steps=self.steps, gamma=merged or self._loaded)

    def load(self, state: ClippingState | None) -> bool:
        if not isinstance(state, AdaGCState):
            return False
        self.steps, self._loaded = state.steps, dict(state.gamma)
        self.names, self.gamma = [], None
        return True

    def _gammas(self, partition: Partition) -> Tensor:
        if self.gamma is None:
            self.names = list(partition.index)
            known = [self._loaded.get(name) for name in self.names]
            device = partition.shards[0].flat.device
            self.gamma = torch.tensor([inf if value is None else value for value in known], device=device)
        return self.gamma


def build_clipping(config: OptimizerConfig, pipeline_group: dist.ProcessGroup | None = None) -> Clipping:
    """The rule that ``optimizer.clipping`` names."""
    if config.clipping == "zclip":
        return ZClip(config)
    return AdaGC(config, pipeline_group) if config.clipping == "adagc" else GlobalNorm(config)
