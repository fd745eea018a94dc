"""What the forward pass measures of itself: outputs of linear layers, attention, output logits.

Each block adds to a row of its own, on the device, without waiting for it; ranks and micro batches are brought together
once the step is over. In a step that is not measured, and without probes, a layer's output passes through untouched.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from megatron_stable.model.elementwise import soft_cap
from megatron_stable.model.scores import Scores
from megatron_stable.parallel.topology import TensorParallel

POINTS = ("q", "k", "v", "proj", "fc1", "fc2", "residual")  # what QKV gives follows from its parts
SHARDED = ("q", "k", "v", "fc1")  # over TP; the others are, under SP, along the sequence, or whole on each rank
LOWEST, HIGHEST = -32, 32  # powers of two between which histograms have buckets, one each
LOGITS = ("logits", "weighted", "log_z", "sampled_log_z")


class Unprobed:
    """The probe of a layer that nobody measures."""

    def __call__(self, point: str, x: Tensor) -> Tensor:
        """``x``, as it is."""
        return x

    def attention(self, q: Tensor, k: Tensor, scores: Scores, starts: Tensor | None = None) -> None:
        """Nothing."""


UNPROBED = Unprobed()


class Switch:
    """Whether this step is measured, and what."""

    def __init__(self, groups: Collection[str]) -> None:
        self.on = self.histograms = False
        self.outputs, self.attention = "outputs" in groups, "attention" in groups


class BlockProbe(Unprobed):
    """The probe of a block.

    Args:
        sums: fp64 ``[points + heads/tp]``: sums of squares of outputs; of entropies of attention.
        tops: fp64 ``[points + heads/tp]``: largest magnitudes of outputs; largest attention logits.
        counts: fp64 ``[points, powers of two]``: of magnitudes of outputs; ``None``: there are no histograms.
        stride: Distance of the queries that are looked at.
    """

    def __init__(self, switch: Switch, sums: Tensor, tops: Tensor, counts: Tensor | None, stride: int) -> None:
        self.switch, self.sums, self.tops, self.counts, self.stride = switch, sums, tops, counts, stride

    def __call__(self, point: str, x: Tensor) -> Tensor:
        """Measure the output of a linear layer, ``[..., features]``, or the residual stream; returns it."""
        # of a block that is recomputed, the pass with gradients counts
        if self.switch.on and self.switch.outputs and torch.is_grad_enabled():
            self._output(POINTS.index(point), x.detach())
        if self.switch.histograms and self.counts is not None and torch.is_grad_enabled():
            self.counts[POINTS.index(point)].add_(magnitudes(x.detach()))
        return x

    def _output(self, column: int, x: Tensor) -> None:
        squares = torch.linalg.vector_norm(x, dim=-1, dtype=_wide(x)).double().square().sum()
        low, high = torch.aminmax(x)
        self.sums[column].add_(squares)
        self.tops[column].copy_(torch.maximum(self.tops[column], torch.maximum(-low, high)))

    def attention(self, q: Tensor, k: Tensor, scores: Scores, starts: Tensor | None = None) -> None:
        """Measure attention by ``q`` ``[b, heads/tp, s, d]`` and ``k`` ``[b, groups/tp, s, d]``, within documents that
        begin at ``starts`` ``[b, s]``."""
        if self.switch.on and self.switch.attention and torch.is_grad_enabled():
            top, entropy = attention_statistics(q.detach(), k.detach(), scores, self.stride, starts)
            self.tops[len(POINTS) :].copy_(torch.maximum(self.tops[len(POINTS) :], top))
            self.sums[len(POINTS) :].add_(entropy)


def magnitudes(x: Tensor) -> Tensor:
    """How many elements have a magnitude in ``[2^n, 2^(n + 1))``, for each n from ``LOWEST`` to below ``HIGHEST``;
    what is smaller or larger, zeros among them, is in the first and last bucket. NaNs are in none."""
    powers = x.abs().to(_wide(x)).log2().clamp_(LOWEST, HIGHEST - 0.5).floor_().nan_to_num_(nan=HIGHEST)
    # histc would count in fp32, and on a GPU not in a fixed order
    counts = torch.zeros(HIGHEST - LOWEST + 1, dtype=torch.float64, device=x.device)
    buckets = powers.flatten().long() - LOWEST
    return counts.index_add_(0, buckets, torch.ones_like(buckets, dtype=torch.float64))[:-1]


def stride_of(length: int, positions: int) -> int:
    """Distance of positions, evenly spaced and at most so many, of a sequence: the last one of each stretch counts."""
    return -(-length // positions)


def attention_statistics(
    q: Tensor, k: Tensor, scores: Scores, stride: int, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Of every ``stride``-th query: largest logit of each head, before a cap, and the entropies' sum, in nats.

    Args:
        q: ``[b, heads, s, d]``.
        k: ``[b, groups, s, d]``, each for several of ``q``'s heads.
        starts: ``[b, s]``: the first key that each query sees; ``None``: the row's.

    Returns:
        ``[heads]``, ``[heads]``, in fp32 or better; of the probabilities before clipping and dropout.
    """
    length, wide = q.shape[2], _wide(q)
    q = q[:, :, stride - 1 :: stride].unflatten(1, (k.shape[1], -1))  # [b, groups, queries, sampled, d]
    logits = (q.to(wide).flatten(2, 3) @ k.to(wide).transpose(-2, -1)).unflatten(2, q.shape[2:4]) * scores.scale
    position = torch.arange(length, device=q.device)
    hidden = position > position[stride - 1 :: stride, None]
    if starts is not None:
        hidden = (hidden | (position < starts[:, stride - 1 :: stride, None]))[:, None, None]
    top = logits.masked_fill(hidden, -torch.inf).amax((0, 3, 4)).flatten()
    if scores.cap is not None:
        logits = soft_cap(logits, scores.cap)
    p = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    # - sum of p log p, where 0 log 0 = 0
    return top, -torch.special.xlogy(p, p).sum((0, 3, 4)).flatten()


@torch.no_grad()
def logit_statistics(
    logits: Tensor, log_z: Tensor, tp: TensorParallel, vocab_size: int, cap: float | None, stride: int
) -> tuple[Tensor, Tensor]:
    """What this rank's columns of the output logits say, to be added up over TP.

    Entropy is log Z - sum of p y over the vocabulary: with log Z known, the columns of each rank add to it alone.

    Args:
        logits: ``[b, s, v/tp]``.
        log_z: ``[b, s]``, over the whole vocabulary.

    Returns:
        fp64 ``[4]``, sums in the order of :data:`LOGITS`, and the largest logit.
    """
    columns = logits.shape[-1]
    valid = min(columns, max(0, vocab_size - tp.rank * columns))
    y = logits[:, stride - 1 :: stride, :valid].to(log_z.dtype)
    if cap is not None:
        y = soft_cap(y, cap)
    sampled = log_z[:, stride - 1 :: stride]
    weighted = (y - sampled.unsqueeze(-1)).exp_().mul_(y)
    once = 1.0 if tp.rank == 0 else 0.0  # log Z is the same on all TP ranks
    sums = [y.double().sum(), weighted.double().sum(), once * log_z.double().sum(), once * sampled.double().sum()]
    return torch.stack(sums), y.amax() if valid else log_z.new_full((), -torch.inf)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
