"""AdamW, clipping and learning rates from the formulas, and the plain training loop that uses them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_stable.config.schema import Config, OptimizerConfig
from tests.reference import model
from tests.reference.model import Parameters


@dataclass(frozen=True)
class Trained:
    """What ``train`` saw, per step, and where it ended."""

    losses: list[float]
    grad_norms: list[float]
    """Global L2 norm before clipping."""
    learning_rates: list[float]
    parameters: Parameters


def learning_rate(step: int, cfg: Config) -> float:
    """Learning rate of optimizer step 1, 2, …

    Warm-up over W steps: peak * step / W. After it, for a run of T steps, with progress p:

    - constant: peak
    - linear, cosine: from peak at W to min at T, p = (step - W) / (T - W)
    - wsd: peak until T - decay_fraction * T (W, if that is later), then linear to min at T
    - inverse_sqrt: peak * sqrt(max(W, 1) / step), not below min

    With rewarm (S, N): in step S + n, for n = 1 to N, n / N of that.
    """
    again = cfg.schedule.rewarm
    if again is not None and again[0] < step < sum(again):
        return scheduled(step, cfg) * (step - again[0]) / again[1]
    return scheduled(step, cfg)


def scheduled(step: int, cfg: Config) -> float:
    """The same without the re-warm-up."""
    peak, low = cfg.optimizer.learning_rate, cfg.schedule.min_learning_rate
    warmup, last = cfg.schedule.warmup_steps, cfg.run.steps
    if cfg.schedule.warmup_tokens is not None:
        warmup = math.ceil(cfg.schedule.warmup_tokens / (cfg.batch.global_size * cfg.model.sequence_length))
    if step <= warmup:
        return peak * step / warmup
    match cfg.schedule.kind:
        case "constant":
            return peak
        case "linear":
            return peak + (low - peak) * (step - warmup) / (last - warmup)
        case "cosine":
            return low + (peak - low) * (1 + math.cos(math.pi * (step - warmup) / (last - warmup))) / 2
        case "wsd":
            start = max(warmup, last - cfg.schedule.decay_fraction * last)
            return peak if step <= start else peak + (low - peak) * (step - start) / (last - start)
        case "inverse_sqrt":
            return max(low, peak * math.sqrt(max(warmup, 1) / step))
    raise AssertionError(cfg.schedule.kind)


def clip(gradients: Parameters, limit: float) -> tuple[Parameters, float]:
    """Scale all gradients by limit / (norm + 1e-6) if that is below 1 (limit 0: never); also return the norm before."""
    norm = math.sqrt(sum(float((gradient.double() ** 2).sum()) for gradient in gradients.values()))
    scale = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
    return {name: gradient * scale for name, gradient in gradients.items()}, norm


class AdamW:
    """Adam with decoupled weight decay times the learning rate (arXiv 1711.05101); no decay on 1-d parameters."""

    def __init__(self, parameters: Parameters, cfg: OptimizerConfig):
        self.cfg = cfg
        self.steps = 0
        self.first = {name: torch.zeros_like(value) for name, value in parameters.items()}
        self.second = {name: torch.zeros_like(value) for name, value in parameters.items()}

    def step(self, parameters: Parameters, gradients: Parameters, rate: float) -> Parameters:
        """The parameters after one update."""
        self.steps += 1
        beta1, beta2 = self.cfg.betas
        updated: Parameters = {}
        for name, value in parameters.items():
            gradient = gradients[name]
            self.first[name] = beta1 * self.first[name] + (1 - beta1) * gradient
            self.second[name] = beta2 * self.second[name] + (1 - beta2) * gradient**2
            first = self.first[name] / (1 - beta1**self.steps)
            second = self.second[name] / (1 - beta2**self.steps)
            decay = self.cfg.weight_decay if value.ndim >= 2 else 0.0
            updated[name] = value - rate * decay * value - rate * first / (second.sqrt() + self.cfg.eps)
        return updated


def train(
    parameters: Parameters,
    batches: Sequence[tuple[Tensor, Tensor]],
    cfg: Config,
    steps: int,
    compute_dtype: torch.dtype | None = None,
    loss_of: Callable[..., Tensor] = model.loss,
) -> Trained:
    """Train for ``steps`` optimizer steps, one whole global batch (tokens [b, s], labels [b, s]) each.

    Parameters, moments and update stay in the parameters' dtype; forward and backward run in ``compute_dtype``
    (None: the same), as in mixed precision with master weights.
    """
    if len(batches) < steps:
        raise ValueError(f"{steps} steps asked for, {len(batches)} batches given")
    parameters = {name: value.detach().clone() for name, value in parameters.items()}
    optimizer = AdamW(parameters, cfg.optimizer)
    power = model.PowerIteration(parameters)
    trained = Trained([], [], [], parameters)
    for step, (tokens, labels) in enumerate(batches[:steps], start=1):
        leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        cast = {name: leaf.to(compute_dtype or leaf.dtype) for name, leaf in leaves.items()}
        vectors = power.step(parameters)
        loss = loss_of(cast | vectors, tokens, labels, cfg.model, cfg.loss.z_loss, cfg.loss.mu_loss, cfg.optimizer)
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        gradients, norm = clip(gradients, cfg.optimizer.clip_grad)
        rate = learning_rate(step, cfg)
        parameters = optimizer.step(parameters, gradients, rate)
        trained.losses.append(loss.item())
        trained.grad_norms.append(norm)
        trained.learning_rates.append(rate)
    return Trained(trained.losses, trained.grad_norms, trained.learning_rates, parameters)
