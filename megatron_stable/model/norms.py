"""LayerNorm and RMSNorm, aware of which ranks see which part of their gradient."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_stable.config.schema import ModelConfig
from megatron_stable.parallel.collectives import copy_to
from megatron_stable.parallel.parameters import ONES, ZEROS, parameter
from megatron_stable.parallel.topology import TensorParallel


class Norm(nn.Module):
    """LayerNorm (arXiv 1607.06450) or RMSNorm (arXiv 1910.07467) over the last dimension.

    Args:
        size: Features of the last dimension.
        partial: Whether each TP rank sees only a part of the positions or heads, so that the gradient of the
            (replicated) weight must be summed over TP.
    """

    def __init__(self, size: int, config: ModelConfig, tp: TensorParallel, partial: bool) -> None:
        super().__init__()
        self.tp = tp if partial else TensorParallel()
        self.eps = config.norm_eps
        self.rms = config.norm == "rmsnorm"
        self.weight = parameter((size,), ONES)
        self.bias = parameter((size,), ZEROS) if config.bias and not self.rms else None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., size]`` -> ``[..., size]``; statistics are computed in fp32."""
        weight = copy_to(self.weight, self.tp)
        if self.rms:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        bias = None if self.bias is None else copy_to(self.bias, self.tp)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


def residual_norm(config: ModelConfig, tp: TensorParallel) -> Norm:
    """A norm over the hidden dimension of the residual stream: sharded along the sequence under SP."""
    return Norm(config.hidden, config, tp, partial=tp.sequence)


def head_norm(config: ModelConfig, tp: TensorParallel) -> Norm:
    """A norm over the width of one head, its weight shared by all heads: each TP rank sees its own heads only."""
    return Norm(config.head_dim, config, tp, partial=True)
