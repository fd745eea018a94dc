"""Caps, factors and gradient factors: the pieces of the recipes that act on each element alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_stable.parallel.parameters import parameter
from megatron_stable.parallel.shards import Init


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """c x tanh(x / c) (Gemma 2, arXiv 2408.00118): nearly x where it is small, never beyond +-c."""
    return cap * torch.tanh(x / cap)


class Scale(nn.Module):
    """Multiply by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class LayerScale(nn.Module):
    """A learned factor per feature (arXiv 2103.17239), beside a constant one.

    Args:
        initial: The first value of the learned factors.
        factor: The constant.
        partial: Whether each TP rank sees only a part of the positions.
    """

    def __init__(self, size: int, initial: float, factor: float, partial: bool) -> None:
        super().__init__()
        self.factor = factor
        self.weight = parameter((size,), Init(mean=initial), partial=partial)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., size]`` -> ``[..., size]``."""
        return x * (self.weight * self.factor)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class ScaleGradient(nn.Module):
    """The identity; multiplies the gradient: alpha x + (1 - alpha) stop_gradient(x) (GLM-130B, arXiv 2210.02414)."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return _ScaleGradient.apply(x, self.factor)
