"""Position information: rotary embeddings, and the learned table with all else that follows the token embedding."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_stable.config.schema import ModelConfig
from megatron_stable.model.init import embedding_init
from megatron_stable.parallel.parameters import parameter
from megatron_stable.parallel.random import dropout
from megatron_stable.parallel.topology import TensorParallel


def rotary_table(length: int, width: int, theta: float, device: torch.device) -> Tensor:
    """cos and sin ``[2, length, width]`` in fp32 of the angles position x theta^(-2i/width) (arXiv 2104.09864)."""
    return _rotary_table(length, width, theta, device)


@lru_cache(maxsize=8)
def _rotary_table(length: int, width: int, theta: float, device: torch.device) -> Tensor:
    frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies).repeat(1, 2)
    return torch.stack((angles.cos(), angles.sin())).float().to(device)


class Positions(NamedTuple):
    """Where the tokens of a pass are in their sequences.

    Attributes:
        each: ``[b, s]``.
        bound: More than any of them.
        turns: Their rows of the rotary table, ``[2, b, s, d]``, looked up once for all layers; ``None``: they are not
            rotary.
    """

    each: Tensor
    turns: Tensor | None


def positions_of(each: Tensor, bound: int, config: ModelConfig) -> Positions:
    """Positions ``[b, s]``, all below ``bound``, for the layers of a model."""
    rotary = config.positions == "rope"
    turns = rotary_table(bound, config.head_dim, config.rope_theta, each.device)[:, each] if rotary else None
    return Positions(each, turns)


def rotate(x: Tensor, theta: float, positions: Positions | None = None) -> Tensor:
    """Rotary embedding of ``[b, s, heads, d]``: dimension i is paired with i + d/2; computed in fp32.

    ``positions``: of the tokens; ``None``: 0, 1, ... in all rows.
    """
    given = positions.turns if positions is not None else None
    cos, sin = (rotary_table(x.shape[1], x.shape[-1], theta, x.device) if given is None else given).unsqueeze(-2)
    if torch.compiler.is_compiling():  # which fuses the plain equation
        first, second = x.chunk(2, -1)
        return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)
    return _Rotation.apply(x, cos, sin) if torch.is_grad_enabled() else _rotated(x, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The plain equation with half of its memory traffic, and the same bits."""
    (first, second), half = x.chunk(2, -1), sin.chunk(2, -1)[0]
    y = x * cos
    below, above = y.chunk(2, -1)
    below -= second * half
    above += first * half
    return y.to(x.dtype)


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation by the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotation.apply(grad, cos, -sin), None, None


class EmbeddingOutput(nn.Module):
    """What follows the token embedding: learned positions (if any), then dropout.

    Attributes:
        positions: Of the tokens of this pass; ``None``: 0, 1, ... in all rows.
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.tp, self.dropout = tp, config.dropout
        self.positions: Positions | None = None
        learned = config.positions == "learned"
        shape = (config.sequence_length, config.hidden)
        self.weight = parameter(shape, embedding_init(config), partial=tp.sequence_sharded) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        """``[b, s, h]``, under SP ``[b, s/tp, h]``, to the same."""
        if self.weight is not None:
            if self.positions is not None or self.tp.sequence_sharded:
                x = x + F.embedding(self._positions(x), self.weight)
            else:
                x = x + self.weight[: x.shape[1]]
        return dropout(x, self.dropout, self.training, self.tp)

    def _positions(self, x: Tensor) -> Tensor:
        """Where in their sequences this rank's tokens are: ``[b, s]``, under SP ``[b, s/tp]``."""
        tokens, shards = x.shape[0] * x.shape[1], self.tp.size if self.tp.sequence_sharded else 1
        first = self.tp.rank * tokens if shards > 1 else 0
        if self.positions is not None:
            return self.positions.each.flatten()[first : first + tokens].view(x.shape[:2])
        return torch.arange(first, first + tokens, device=x.device).remainder_(x.shape[1] * shards).view(x.shape[:2])
