"""Causal self-attention with grouped queries, QK-norm and a soft cap, over the local heads of a TP rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_stable.config.schema import ModelConfig
from megatron_stable.model.init import linear_init, output_init
from megatron_stable.model.norms import head_norm
from megatron_stable.model.positions import rotate
from megatron_stable.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_stable.parallel.random import sharded_region
from megatron_stable.parallel.topology import TensorParallel

# q, k, v: [b, heads, s, d] (k and v may have fewer heads), cap, dropout -> [b, heads, s, d]
Backend = Callable[[Tensor, Tensor, Tensor, float | None, float], Tensor]


def math_attention(q: Tensor, k: Tensor, v: Tensor, cap: float | None, dropout: float) -> Tensor:
    """The reference: every step in plain sight, the s x s probabilities in memory; logits and softmax are fp32."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(wide) @ k.to(wide).transpose(-2, -1)) * q.shape[-1] ** -0.5  # [b, heads, s, s]
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    probabilities = logits.masked_fill(future, -torch.inf).softmax(-1)
    return F.dropout(probabilities, dropout).to(v.dtype) @ v


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, cap: float | None, dropout: float) -> Tensor:
    """PyTorch's fused attention; it has no cap."""
    assert cap is None
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=grouped)


@lru_cache(maxsize=1)
def _flex() -> Any:
    from torch.nn.attention import flex_attention as flex

    compiled = torch.compile(flex.flex_attention, dynamic=False)
    mask = lru_cache(maxsize=8)(
        lambda length, device: flex.create_block_mask(
            lambda b, h, query, key: query >= key, None, None, length, length, device=device
        )
    )
    return compiled, mask


def _capped(cap: float, score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return cap * torch.tanh(score / cap)


@lru_cache(maxsize=8)
def _score_mod(cap: float) -> Callable[..., Tensor]:
    return partial(_capped, cap)  # one object per cap: a new one would compile the kernel anew


def flex_attention(q: Tensor, k: Tensor, v: Tensor, cap: float | None, dropout: float) -> Tensor:
    """FlexAttention: a fused kernel that carries the cap; CUDA only (it has no backward on the CPU), no dropout."""
    assert not dropout
    attend, mask = _flex()
    score_mod = None if cap is None else _score_mod(cap)
    block_mask = mask(q.shape[2], str(q.device))
    out: Tensor = attend(q, k, v, score_mod, block_mask, enable_gqa=q.shape[1] != k.shape[1])
    return out


BACKENDS: dict[str, Backend] = {"math": math_attention, "sdpa": sdpa_attention, "flex": flex_attention}


def choose_backend(config: ModelConfig, device: str) -> str:
    """The name of the fastest backend that computes ``config`` exactly on ``device`` ("cpu", "cuda")."""
    if config.attention != "auto":
        return config.attention
    if config.attention_cap is None:
        return "sdpa"
    return "flex" if device == "cuda" and not config.attention_dropout else "math"


class Attention(nn.Module):
    """Causal self-attention.

    The QKV weight is stored group by group as Megatron does for grouped queries, so that a TP slice is contiguous::

        group 0                      group 1
        [ q ... q (heads/groups) k v | q ... q k v | ... ]
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, backend: str) -> None:
        super().__init__()
        self.tp, self.cap, self.dropout = tp, config.attention_cap, config.attention_dropout
        self.rope_theta = config.rope_theta if config.positions == "rope" else None
        self.head_dim, self.queries = config.head_dim, config.heads // config.groups
        self.backend = BACKENDS[backend]
        width = config.heads * config.head_dim
        qkv = config.groups * (self.queries + 2) * config.head_dim
        self.qkv = ColumnParallelLinear(config.hidden, qkv, linear_init(config, config.hidden), tp, config.bias)
        self.q_norm = head_norm(config, tp) if config.qk_norm else nn.Identity()
        self.k_norm = head_norm(config, tp) if config.qk_norm else nn.Identity()
        self.proj = RowParallelLinear(width, config.hidden, output_init(config, width), tp, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[b, s, h]``, under SP ``[b, s/tp, h]``, to the same."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.queries + 2, self.head_dim))  # [b, s, groups/tp, q..kv, d]
        q, k, v = qkv.split((self.queries, 1, 1), dim=-2)
        q, k, v = (part.flatten(2, 3) for part in (q, k, v))  # [b, s, heads/tp or groups/tp, d]
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_theta is not None:
            q, k = rotate(q, self.rope_theta), rotate(k, self.rope_theta)
        y = self._attend(*(part.transpose(1, 2) for part in (q, k, v)))
        return self.proj(y.transpose(1, 2).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not (self.training and self.dropout):
            return self.backend(q, k, v, self.cap, 0.0)
        with sharded_region(self.tp):  # each rank has heads of its own, and so masks
            return self.backend(q, k, v, self.cap, self.dropout)
