"""The base optimizer and its parameter groups."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from megatron_stable.config.schema import OptimizerConfig
from megatron_stable.parallel.parameters import place


def decays(weight: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to norms and biases."""
    return len(place(weight).full_shape) > 1 and not place(weight).name.endswith(".bias")


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) in two groups, with and without weight decay. The learning rate is set at each step."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for weight in parameters:
        (matrices if decays(weight) else vectors).append(weight)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=torch.finfo(torch.float32).tiny,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
