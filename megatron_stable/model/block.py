"""One Transformer block.

::

     ┌────────────────── skip ──────────────────┐
     x ── input_norm ── f ── output_norm ── scale ── dropout ── + ── post_norm ── x       f: attention, then the MLP

    attention:   qkv ── q_norm, k_norm, v_norm ── rope ── scale x q·k ── cap ── softmax ── clip ── ·v ── proj
    MLP:         fc1 ── activation ── fc2

A norm or factor that the recipe does not have is the identity: the equation below is the same for all recipes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_stable.config.parametrization import ModelMultipliers
from megatron_stable.config.schema import ModelConfig
from megatron_stable.model.attention import Attention
from megatron_stable.model.documents import Documents
from megatron_stable.model.elementwise import LayerScale, Scale
from megatron_stable.model.mlp import MLP
from megatron_stable.model.norms import residual_norm
from megatron_stable.model.positions import rotary_table
from megatron_stable.model.probes import UNPROBED, Unprobed
from megatron_stable.parallel.random import dropout
from megatron_stable.parallel.topology import TensorParallel


class Block(nn.Module):
    """Attention and MLP, each with its residual connection.

    Args:
        recompute: Keep only the block's input and recompute its activations in backward.
        by: Multipliers of the parametrization.

    Attributes:
        documents: Of the rows of the next forward pass; ``None``: one in each.
    """

    def __init__(
        self, config: ModelConfig, tp: TensorParallel, backend: str, recompute: bool, by: ModelMultipliers
    ) -> None:
        super().__init__()
        self.tp, self.dropout, self.recompute = tp, config.dropout, recompute
        self.random = bool(config.dropout or config.attention_dropout)
        self.probe: Unprobed = UNPROBED
        self.documents: Documents | None = None
        # DeepNorm's alpha, decoder-only (arXiv 2203.00555)
        self.skip = Scale((2 * config.layers) ** 0.25) if config.deepnorm else nn.Identity()
        self.attention_input_norm = residual_norm(config, tp, config.attention_input_norm)
        self.attention = Attention(config, tp, backend, by)
        self.attention_output_norm = residual_norm(config, tp, config.attention_output_norm)
        self.attention_scale = branch_scale(config, tp, by.residual)
        self.attention_post_norm = residual_norm(config, tp, config.deepnorm)
        self.mlp_input_norm = residual_norm(config, tp, config.mlp_input_norm)
        self.mlp = MLP(config, tp, by)
        self.mlp_output_norm = residual_norm(config, tp, config.mlp_output_norm)
        self.mlp_scale = branch_scale(config, tp, by.residual)
        self.mlp_post_norm = residual_norm(config, tp, config.deepnorm)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what is within the recomputation, which no graph can hold; all blocks of a kind share one graph."""
        torch.compiler.assume_constant_result(rotary_table)  # else each forward would compute it anew
        self._forward = torch.compile(self._forward, *args, **kwargs)  # type: ignore[method-assign]

    def measure(self, probe: Unprobed) -> None:
        """Let a probe see the outputs of the linear layers, attention, and the residual stream."""
        self.probe = self.attention.probe = self.mlp.probe = probe

    def forward(self, x: Tensor) -> Tensor:
        """``[b, s, h]``, under SP ``[b, s/tp, h]``, to the same."""
        documents = self.documents  # handed on: when it recomputes, other micro batches have been announced
        self.attention.prepare(x, documents)
        if self.recompute and torch.is_grad_enabled():
            # the reentrant form, because under ZeRO-3 the weights are gathered anew for the recomputation
            y: Tensor = checkpoint(self._forward, x, documents, use_reentrant=True, preserve_rng_state=self.random)
            return y
        return self._forward(x, documents)

    def _forward(self, x: Tensor, documents: Documents | None) -> Tensor:
        y = self.attention_output_norm(self.attention(self.attention_input_norm(x), documents))
        x = self.attention_post_norm(self.skip(x) + self._dropout(self.attention_scale(y)))
        y = self.mlp_output_norm(self.mlp(self.mlp_input_norm(x)))
        x = self.mlp_post_norm(self.skip(x) + self._dropout(self.mlp_scale(y)))
        return self.probe("residual", x)

    def _dropout(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training, self.tp)


def branch_scale(config: ModelConfig, tp: TensorParallel, factor: float) -> nn.Module:
    """What attention and MLP are multiplied with before they join the residual stream."""
    if config.layer_scale is not None:
        return LayerScale(config.hidden, config.layer_scale, factor, partial=tp.sequence_sharded)
    return nn.Identity() if factor == 1.0 else Scale(factor)
