"""Causal self-attention with grouped queries and norms on queries, keys, values, over the local heads of a TP rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_stable.config.parametrization import ModelMultipliers
from megatron_stable.config.schema import ModelConfig
from megatron_stable.model import flash
from megatron_stable.model.backends import BACKENDS, Backend
from megatron_stable.model.documents import Documents
from megatron_stable.model.flex import causal_mask, flex_attention
from megatron_stable.model.init import output_init, qkv_init
from megatron_stable.model.largest_logits import max_attention_logits
from megatron_stable.model.norms import projection_norm
from megatron_stable.model.positions import Positions, rotate
from megatron_stable.model.probes import UNPROBED, Unprobed
from megatron_stable.model.scores import Scores
from megatron_stable.model.sigma import reparametrized
from megatron_stable.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_stable.parallel.random import sharded_region
from megatron_stable.parallel.topology import TensorParallel


class Attention(nn.Module):
    """Causal self-attention.

    The QKV weight is stored group by group as Megatron does for grouped queries, so that a TP slice is contiguous::

        group 0                      group 1
        [ q ... q (heads/groups) k v | q ... q k v | ... ]

    Attributes:
        peaks: ``[heads/tp]``, raised to each head's largest logit, before any cap, whenever it trains; ``None``: not.
        positions: Of the tokens of this pass; ``None``: 0, 1, ... in all rows.
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, backend: str, by: ModelMultipliers) -> None:
        super().__init__()
        self.tp, self.dropout = tp, config.attention_dropout
        self.probe: Unprobed = UNPROBED
        self.peaks: Tensor | None = None  # no buffer: half precision would round it, and checkpoints need not hold it
        self.positions: Positions | None = None
        self.scores = Scores(
            by.attention_scale * config.attention_temperature, config.attention_cap, config.attention_clip
        )
        self.rope_theta = config.rope_theta if config.positions == "rope" else None
        self.head_dim, self.queries = config.head_dim, config.heads // config.groups
        self.backend: Backend = BACKENDS[backend]
        width = config.heads * config.head_dim
        qkv = config.groups * (self.queries + 2) * config.head_dim
        self.qkv = reparametrized(
            ColumnParallelLinear(config.hidden, qkv, qkv_init(config, by), tp, config.bias), config
        )
        self.q_norm = projection_norm(config, tp, config.heads, config.qk_norm)
        self.k_norm = projection_norm(config, tp, config.groups, config.qk_norm)
        self.v_norm = projection_norm(config, tp, config.groups, config.v_norm)
        self.proj = reparametrized(
            RowParallelLinear(width, config.hidden, output_init(config, width, by), tp, config.bias), config
        )

    def forward(self, x: Tensor, documents: Documents | None = None) -> Tensor:
        """``[b, s, h]``, under SP ``[b, s/tp, h]``, to the same; ``documents`` of the rows, ``None``: one in each."""
        q, k, v = (part.transpose(1, 2) for part in self.project(x, documents))
        starts = documents.starts if documents is not None else None
        if self.peaks is not None and self.training:
            self.peaks.copy_(torch.maximum(self.peaks, max_attention_logits(q, k, self.scores.scale, starts)))
        self.probe.attention(q, k, self.scores, starts)
        y = self._attend(q, k, v, () if documents is None else (documents.seen,))
        return self.probe("proj", self.proj(y.transpose(1, 2).flatten(2)))

    def prepare(self, x: Tensor, documents: Documents | None = None) -> None:
        """Have what a compiled block must find made, for its input ``[b, s, h]``, under SP ``[b, s/tp, h]``."""
        if self.backend is flex_attention and documents is None:
            causal_mask(x.shape[1] * (self.tp.size if self.tp.sequence else 1), str(x.device))
        if self.backend is flash.flash_attention:
            flash.kernel(self.training and self.dropout > 0, documents is not None)

    def project(self, x: Tensor, documents: Documents | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[b, s, heads/tp, d]``, keys and values ``[b, s, groups/tp, d]``, as attention takes them."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.queries + 2, self.head_dim))  # [b, s, groups/tp, q..kv, d]
        q, k, v = qkv.split((self.queries, 1, 1), dim=-2)
        q, k, v = (self.probe(name, part.flatten(2, 3)) for name, part in (("q", q), ("k", k), ("v", v)))
        q, k, v = self.q_norm(q), self.k_norm(k), self.v_norm(v)
        if self.rope_theta is not None:
            positions = self.positions if documents is None else documents.positions
            q, k = (rotate(x, self.rope_theta, positions) for x in (q, k))
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, seen: tuple[Any, ...]) -> Tensor:
        if not (self.training and self.dropout):
            return self.backend(q, k, v, self.scores, 0.0, *seen)
        with sharded_region(self.tp):  # each rank has heads of its own, and so masks
            return self.backend(q, k, v, self.scores, self.dropout, *seen)
