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
from megatron_stable.model.positions import EmbeddingOutput, positions_of
from megatron_stable.model.scores import Scores, math_attention


class Pass(NamedTuple):
    """Of which sequences tokens go through the model, and what they see.

    Attributes:
        rows: ``[n]``; ``None``: all, in their order.
        place: Where the tokens are, as an index of the memory of a layer.
        seen: How many slots there are up to the last token.
        visible: ``[n, 1, s, seen]``: which slots each sees; ``None``: those up to its own, alike in all sequences.
    """

    rows: Tensor | None
    place: tuple[Tensor | slice, ...]
    seen: int
    visible: Tensor | None


class Cache:
    """The memory of all attention layers.

    Args:
        config: Of the model.
        sequences: That it holds, numbered from 0.
        length: Tokens that there is room for in each.
        device: Where the model is.
    """

    def __init__(self, config: ModelConfig, sequences: int, length: int, device: torch.device) -> None:
        self.config, self.sequences, self.length, self.device = config, sequences, length, device
        self.attend = math_attention if any(limits("sdpa", config)) else sdpa_attention
        self.layers: list[_Memory] = []
        self.places: list[Attention | EmbeddingOutput] = []
        self.now: Pass | None = None

    def at(self, rows: Sequence[int], starts: Sequence[int], tokens: int) -> None:
        """Say what the next pass is: ``tokens`` of each of these sequences, from these positions on.

        What earlier passes have left at those positions and behind them is forgotten.
        """
        slots = torch.tensor(starts, device=self.device).unsqueeze(1) + torch.arange(tokens, device=self.device)
        every, seen = list(rows) == list(range(self.sequences)), max(starts) + tokens
        if every and len(set(starts)) == 1 and (tokens == 1 or seen == tokens):
            self.now = Pass(None, (slice(None), slice(None), slice(seen - tokens, seen)), seen, None)
        else:
            chosen = torch.tensor(rows, device=self.device)
            visible = torch.arange(seen, device=self.device) <= slots[:, None, :, None]
            self.now = Pass(None if every else chosen, (slice(None), chosen.unsqueeze(1), slots), seen, visible)
        positions = positions_of(slots, self.length, self.config)
        for module in self.places:
            module.positions = positions

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
        self.held[now.place] = torch.stack((k, v)).transpose(2, 3)
        seen = self.held[:, :, : now.seen]
        keys, values = (seen if now.rows is None else seen[:, now.rows]).transpose(2, 3)
        return self.cache.attend(q, keys, values, scores, dropout, now.visible)


@contextmanager
def remembering(model: nn.Module, config: ModelConfig, sequences: int, length: int) -> Iterator[Cache]:
    """A cache that the model's attention layers use meanwhile; announce each pass with :meth:`Cache.at`.

    Args:
        length: At most ``config.sequence_length``.
    """
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    cache = Cache(config, sequences, length, device)
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
