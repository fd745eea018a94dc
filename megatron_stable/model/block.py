"""One Transformer block.

::

        x ──┬── attention_norm ── attention ── dropout ── + ──┬── mlp_norm ── mlp ── dropout ── + ── x
            └─────────────────────────────────────────────┘   └─────────────────────────────────┘

    inside attention:   qkv ── q_norm, k_norm ── rope ── q·k/√d ── cap ── softmax ── ·v ── proj

A norm that the recipe does not have is the identity: the equation below is the same for all recipes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_stable.config.schema import ModelConfig
from megatron_stable.model.attention import Attention
from megatron_stable.model.mlp import MLP
from megatron_stable.model.norms import residual_norm
from megatron_stable.parallel.random import dropout
from megatron_stable.parallel.topology import TensorParallel


class Block(nn.Module):
    """Attention and MLP, each with its residual connection.

    Args:
        recompute: Keep only the block's input and recompute its activations in backward.
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, backend: str, recompute: bool) -> None:
        super().__init__()
        self.tp, self.dropout, self.recompute = tp, config.dropout, recompute
        self.random = bool(config.dropout or config.attention_dropout)
        self.attention_norm = residual_norm(config, tp)
        self.attention = Attention(config, tp, backend)
        self.mlp_norm = residual_norm(config, tp)
        self.mlp = MLP(config, tp)

    def forward(self, x: Tensor) -> Tensor:
        """``[b, s, h]``, under SP ``[b, s/tp, h]``, to the same."""
        if self.recompute and torch.is_grad_enabled():
            # the reentrant form, because under ZeRO-3 the weights are gathered anew for the recomputation
            y: Tensor = checkpoint(self._forward, x, use_reentrant=True, preserve_rng_state=self.random)
            return y
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        x = x + self._dropout(self.attention(self.attention_norm(x)))
        return x + self._dropout(self.mlp(self.mlp_norm(x)))

    def _dropout(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training, self.tp)
