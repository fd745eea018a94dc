"""Keys and values of earlier tokens, so that a model that generates computes each token once.

The token at position p of a sequence has slot p, in each attention layer. A query sees the slots up to its own position
and no others: what padding has left behind a shorter sequence is overwritten before anybody sees it::

    slot          0  1  2  3  4
    sequence 0    a  b  c  d  .      the next token is at 4, and sees 0-4
    sequence 1    a  b  x  x  .      the next token is at 2, and sees 0-2; x: computed from padding

Attention itself does not change: that it remembers is the business of its backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_stable.config.attention import limits
from megatron_stable.config.schema import ModelConfig
from megatron_stable.model.attention import Attention
from megatron_stable.model.backends import sdpa_attention
from megatron_stable.model.positions import EmbeddingOutput, Positions
from megatron_stable.model.scores import Scores, math_attention


class Pass(NamedTuple):
    """Of which sequences tokens go through the model, and what they see.

    Attributes:
        rows: ``[n, 1]``; ``None``: all, in their order.
        slots: ``[n, s]``: where the tokens are.
        visible: ``[n, 1, s, seen]``: which slots each sees.
    """

    rows: Tensor | None
    slots: Tensor
    visible: Tensor


class Cache:
    """The memory of all attention layers.

    Args:
        sequences: That it holds, numbered from 0.
        length: Tokens that there is room for in each.
        device: Where the model is.
        fused: Whether PyTorch's fused attention computes the model.
    """

    def __init__(self, sequences: int, length: int, device: torch.device, fused: bool) -> None:
        self.sequences, self.length, self.device = sequences, length, device
        self.attend = sdpa_attention if fused else math_attention
        self.layers: list[_Memory] = []
        self.places: list[Attention | EmbeddingOutput] = []
        self.now: Pass | None = None

    def at(self, rows: Sequence[int], starts: Sequence[int], tokens: int) -> None:
        """Say what the next pass is: ``tokens`` of each of these sequences, from these positions on.

        What earlier passes have left at those positions and behind them is forgotten.
        """
        first = torch.tensor(starts, device=self.device).unsqueeze(1)
        slots = first + torch.arange(tokens, device=self.device)
        visible = torch.arange(max(starts) + tokens, device=self.device) <= slots[:, None, :, None]
        every = list(rows) == list(range(self.sequences))
        self.now = Pass(None if every else torch.tensor(rows, device=self.device).unsqueeze(1), slots, visible)
        for module in self.places:
            module.positions = Positions(slots, self.length)

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the other sequences; these are numbered anew, in this order."""
        self.sequences, chosen = len(rows), torch.tensor(rows, dtype=torch.int64, device=self.device)
        for layer in self.layers:
            layer.held = None if layer.held is None else layer.held[:, chosen]


class _Memory:
    """An attention backend: queries of new tokens see the keys and values of all tokens so far."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.held: Tensor | None = None  # [keys or values, sequences, length, groups/tp, d]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores, dropout: float) -> Tensor:
        now = self.cache.now
        assert now is not None
        if self.held is None:  # zeros, as a weight of 0 does not hide a NaN
            self.held = k.new_zeros(2, self.cache.sequences, self.cache.length, k.shape[1], k.shape[3])
        rows = torch.arange(len(k), device=k.device).unsqueeze(1) if now.rows is None else now.rows
        self.held[:, rows, now.slots] = torch.stack((k, v)).transpose(2, 3)
        seen = self.held[:, :, : now.visible.shape[-1]]
        keys, values = (seen if now.rows is None else seen[:, now.rows[:, 0]]).transpose(2, 3)
        return self.cache.attend(q, keys, values, scores, dropout, now.visible)


@contextmanager
def remembering(model: nn.Module, config: ModelConfig, sequences: int, length: int) -> Iterator[Cache]:
    """A cache that the model's attention layers use meanwhile; announce each pass with :meth:`Cache.at`.

    Args:
        length: At most ``config.sequence_length``.
    """
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    cache = Cache(sequences, length, device, fused=not any(limits("sdpa", config)))
    cache.places = [module for module in model.modules() if isinstance(module, (Attention, EmbeddingOutput))]
    before = [(module, module.backend) for module in cache.places if isinstance(module, Attention)]
    for module, _ in before:
        module.backend = memory = _Memory(cache)
        cache.layers.append(memory)
    try:
        yield cache
    finally:
        for module, backend in before:
            module.backend = backend
        for place in cache.places:
            place.positions = None
