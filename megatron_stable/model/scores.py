"""From queries and keys to the weights of the values, and attention with every step in plain sight: the reference."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_stable.model.elementwise import soft_cap


class Scores(NamedTuple):
    """From queries and keys to the weights of the values: clip(softmax(cap(scale x q k))).

    Attributes:
        scale: Factor of q k.
        cap: c of c x tanh(logit / c).
        clip: [gamma, zeta] of clip((zeta - gamma) x softmax + gamma, 0, 1); what is masked stays 0, as gamma <= 0.
    """

    scale: float
    cap: float | None = None
    clip: tuple[float, float] | None = None


def visible(starts: Tensor, device: torch.device) -> Tensor:
    """Which keys each query sees, ``[b, 1, s, s]``: those from its document's start ``[b, s]`` to its own."""
    starts = starts.to(device, non_blocking=True)
    places = torch.arange(starts.shape[1], device=device)
    return ((places <= places[:, None]) & (places >= starts[..., None])).unsqueeze(1)


def math_attention(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, dropout: float, visible: Tensor | None = None
) -> Tensor:
    """The reference, with the s x s probabilities in memory; logits and softmax are fp32.

    ``visible`` ``[b, 1, s, keys]``: which keys each query sees; ``None``: those up to its own, the last
    query's being the last.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(wide) @ k.to(wide).transpose(-2, -1)) * scores.scale  # [b, heads, s, s]
    if scores.cap is not None:
        logits = soft_cap(logits, scores.cap)
    if visible is None:
        logits = logits.masked_fill(
            torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + k.shape[2] - q.shape[2]),
            -torch.inf,
        )
    else:
        logits = torch.where(visible, logits, -torch.inf)
    probabilities = logits.softmax(-1)
    if scores.clip is not None:
        gamma, zeta = scores.clip
        probabilities = ((zeta - gamma) * probabilities + gamma).clamp(0, 1)
    return F.dropout(probabilities, dropout).to(v.dtype) @ v
