"""QK-Clip (MuonClip, arXiv 2507.20534): scale down queries and keys of heads whose attention logits grew too large."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from megatron_stable.config.schema import ModelConfig
from megatron_stable.optim.partition import LocalShard, Partition, row_blocks


def qk_clip_(
    partition: Partition,
    flats: Iterable[Tensor],
    max_logits: Mapping[str, Tensor],
    model: ModelConfig,
    threshold: float = 100.0,
    alpha: float = 0.5,
) -> None:
    """Clip the heads of the QKV weights (and biases) in ``flats``, after an optimizer step. No communication.

    Args:
        max_logits: By block ("blocks.0"), ``[heads/tp]``: the largest logit of each local head over the global batch,
            so already the maximum over micro batches and DP. A norm on queries and keys would undo the scaling.
    """
    for _, shard in partition.within(flats):
        block, _, rest = shard.place.name.partition(".attention.qkv.")
        if rest and block in max_logits:
            scale_rows_(shard, row_factors(max_logits[block], model, threshold, alpha))


def row_factors(max_logits: Tensor, model: ModelConfig, threshold: float = 100.0, alpha: float = 0.5) -> Tensor:
    """What each row of the QKV weight is multiplied by, so that no head's logits pass ``threshold``.

    With gamma = min(1, threshold / S_max) of a head, its logits shrink by gamma exactly: the queries by gamma^alpha,
    the keys by gamma^(1 - alpha). Where query heads share a key, the one that needs the most sets the key's factor,
    kappa = (min gamma)^(1 - alpha), and each head's queries take gamma / kappa, so that heads within bounds compute
    what they did.

    Args:
        max_logits: ``[heads/tp]``, the largest logit of each head, over the whole global batch.

    Returns:
        fp32 ``[groups/tp x (queries + 2) x head_dim]``, in the order of the rows of QKV; 1 for the values.
    """
    gamma = (threshold / max_logits.float()).clamp(max=1.0)
    gamma = torch.where((max_logits > 0) & max_logits.isfinite(), gamma, 1.0)
    gamma = gamma.view(-1, model.heads // model.groups)  # [groups/tp, queries]
    key = gamma.amin(1, keepdim=True) ** (1 - alpha)
    factors = torch.cat([gamma / key, key, torch.ones_like(key)], dim=1)  # [groups/tp, queries + 2]
    return factors.flatten().repeat_interleave(model.head_dim)


def scale_rows_(shard: LocalShard, factors: Tensor) -> None:
    """Multiply the rows of a weight ``[rows, in]`` or bias ``[rows]`` by ``factors`` ``[rows of this TP slice]``."""
    width = shard.place.full_shape[1] if len(shard.place.full_shape) > 1 else 1
    for row, _, block in row_blocks(shard.of(shard.flat), shard.start, width):
        block *= factors[row : row + block.shape[0], None]
