"""LayerNorm and RMSNorm, aware of which ranks see which part of their gradient or of their statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_stable import apex
from megatron_stable.config.schema import ModelConfig
from megatron_stable.parallel.collectives import copy_to, reduce_from
from megatron_stable.parallel.parameters import parameter
from megatron_stable.parallel.shards import ONES, ZEROS
from megatron_stable.parallel.topology import TensorParallel


class Norm(nn.Module):
    """LayerNorm (arXiv 1607.06450) or RMSNorm (arXiv 1910.07467) over the last dimension.

    Args:
        size: Features of the last dimension.
        partial: Whether each TP rank sees only a part of the positions or heads.
    """

    def __init__(self, size: int, config: ModelConfig, partial: bool) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.rms = config.norm == "rmsnorm"
        self.weight = parameter((size,), ONES, partial=partial)
        self.bias = parameter((size,), ZEROS, partial=partial) if config.bias and not self.rms else None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., size]`` -> ``[..., size]``; statistics are computed in fp32."""
        return _norm(x, self.weight, self.bias, self.rms, self.eps)


class ShardedNorm(nn.Module):
    """A norm over all heads together, of which each TP rank has some: the statistics are those of the whole.

    Args:
        heads: In all.
    """

    def __init__(self, heads: int, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.tp, self.size = tp, heads * config.head_dim
        self.eps = config.norm_eps
        self.rms = config.norm == "rmsnorm"
        self.weight = parameter((self.size,), ONES, tp, 0)
        self.bias = parameter((self.size,), ZEROS, tp, 0) if config.bias and not self.rms else None

    def forward(self, x: Tensor) -> Tensor:
        """``[b, s, heads/tp, d]`` to the same; statistics are computed in fp32, the variance from what is centred."""
        flat = x.flatten(-2)
        if not self.tp.active:
            return _norm(flat, self.weight, self.bias, self.rms, self.eps).view_as(x)
        wide = flat.to(torch.promote_types(x.dtype, torch.float32))
        if not self.rms:
            wide = wide - self._mean(wide)
        y = wide * torch.rsqrt(self._mean(wide.square()) + self.eps) * self.weight
        return (y if self.bias is None else y + self.bias).to(x.dtype).view_as(x)

    def _mean(self, x: Tensor) -> Tensor:
        """Mean of the last dimension of all ranks; its gradient comes from all ranks, too."""
        return copy_to(reduce_from(x.sum(-1, keepdim=True), self.tp), self.tp) / self.size


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, rms: bool, eps: float) -> Tensor:
    if rms:
        kernels = None if torch.compiler.is_compiling() else apex.taken()  # a compiled block fuses more than the norm
        if kernels is not None and x.is_cuda and x.dtype == weight.dtype and x.numel() < apex.MOST:
            return kernels.rms_norm(x, weight, weight.shape, eps)
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def residual_norm(config: ModelConfig, tp: TensorParallel, present: bool = True) -> nn.Module:
    """A norm over the hidden dimension of the residual stream, sharded along the sequence under SP; or the identity."""
    return Norm(config.hidden, config, partial=tp.sequence_sharded) if present else nn.Identity()


def projection_norm(config: ModelConfig, tp: TensorParallel, heads: int, present: bool) -> nn.Module:
    """A norm on queries, keys or values, in all or per head with one weight for all heads; or the identity."""
    if not present:
        return nn.Identity()
    if config.qk_norm_scope == "full":
        return ShardedNorm(heads, config, tp)
    return Norm(config.head_dim, config, partial=tp.active)  # each TP rank sees its own heads only
