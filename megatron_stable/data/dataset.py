"""Samples out of token streams: one dataset in shuffled windows, or several blended by weight.

Sample k is found in O(1) time and memory, from nothing but k, the seed and the weights; there is no index to build.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_stable.data.order import SampleOrder
from megatron_stable.data.shards import Tokens, open_tokens
from megatron_stable.data.sources import read_sources
from megatron_stable.errors import ConfigError, DataError

YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Location:
    """Where a sample lies: tokens `start .. start + sequence_length` of a dataset, in its epoch number `epoch`."""

    dataset: TokenDataset
    epoch: int
    start: int

    def read(self) -> np.ndarray:
        """The sample's tokens, int64 `[sequence_length + 1]`: inputs all but the last, targets all but the first."""
        return self.dataset.indexed.read(self.start, self.dataset.sequence_length + 1).astype(np.int64)

    def prefetch(self) -> None:
        """Have the operating system fetch the tokens in the background."""
        self.dataset.indexed.will_need(self.start, self.dataset.sequence_length + 1)


class Samples(Protocol):
    """What can be trained on: an endless series of samples."""

    sequence_length: int

    @property
    def parts(self) -> Sequence[TokenDataset]:
        """The datasets that the samples come from."""
        ...

    def locate(self, k: int) -> Location:
        """Where sample k (from 0) lies."""
        ...

    def sample(self, k: int) -> np.ndarray:
        """Tokens of sample k (from 0), int64 `[sequence_length + 1]`."""
        ...


class TokenDataset:
    """One stream of tokens, a .bin/.idx or shards, in windows of sequence_length + 1 tokens, shuffled anew each epoch.

    Windows begin every sequence_length tokens, so that each token is a target once per epoch (the stream's first, and
    a rest shorter than a window, are not). Raises DataError if the dataset is unusable or shorter than one window.
    """

    def __init__(self, source: str | Path | Sequence[str] | Tokens, sequence_length: int, seed: int) -> None:
        self.indexed = open_tokens(source) if isinstance(source, str | Path | Sequence) else source
        self.sequence_length = sequence_length
        self.windows = (self.indexed.tokens - 1) // sequence_length
        """Samples per epoch."""
        if self.windows < 1:
            raise DataError(
                f"dataset {self.indexed.prefix} has {self.indexed.tokens} tokens, one sample needs "
                f"{sequence_length + 1} "
                f"(model.sequence_length {sequence_length} + 1): give more text or a shorter sequence_length"
            )
        self._order = SampleOrder(self.windows, seed)

    @property
    def parts(self) -> Sequence[TokenDataset]:
        """This dataset."""
        return [self]

    def locate(self, k: int) -> Location:
        """Where sample k (from 0) lies."""
        epoch, window = self._order.sample(k)
        return Location(self, epoch, window * self.sequence_length)

    def sample(self, k: int) -> np.ndarray:
        """Tokens of sample k (from 0), int64 `[sequence_length + 1]`."""
        return self.locate(k).read()


class Blend:
    """Several datasets mixed sample by sample in proportion to their weights, whatever their sizes.

    The first dataset gets its share of all samples, spread evenly; the second its share of what is left; and so on.
    Each share is a rounded multiple of k (a Beatty sequence) in exact arithmetic, so that the counts after k samples
    are a formula, and stay within a small constant of weight x k for ever. Raises ConfigError for unusable weights.
    """

    def __init__(self, datasets: Sequence[TokenDataset], weights: Sequence[float]) -> None:
        if not datasets or len(datasets) != len(weights):
            raise ConfigError(
                f"a blend needs datasets with a weight each; got {len(datasets)} and {len(weights)} weights"
            )
        for dataset, weight in zip(datasets, weights, strict=True):
            if not (isfinite(weight) and weight > 0):
                raise ConfigError(
                    f"weight {weight} of {dataset.indexed.prefix} in the blend: it must be a number above 0"
                )
        self.parts: Sequence[TokenDataset] = list(datasets)
        self.sequence_length = datasets[0].sequence_length
        # 0.1 is meant to be one tenth, not the nearest binary fraction.
        exact = [Fraction(repr(float(weight))) for weight in weights]
        self._shares = [(share / sum(exact[i:])).as_integer_ratio() for i, share in enumerate(exact)]

    def assign(self, k: int) -> tuple[int, int]:
        """Which dataset sample k comes from, and which of that dataset's samples it is, both from 0."""
        for i, share in enumerate(self._shares):
            before = _rounded(k, share)
            if _rounded(k + 1, share) > before:
                return i, before
            k -= before
        raise AssertionError("the last dataset takes all that is left")

    def counts(self, k: int) -> list[int]:
        """How many of the first k samples come from each dataset."""
        counts = []
        for share in self._shares:
            counts.append(_rounded(k, share))
            k -= counts[-1]
        return counts

    def locate(self, k: int) -> Location:
        """Where sample k (from 0) lies."""
        part, own = self.assign(k)
        return self.parts[part].locate(own)

    def sample(self, k: int) -> np.ndarray:
        """Tokens of sample k (from 0), int64 `[sequence_length + 1]`."""
        return self.locate(k).read()


def _rounded(k: int, share: tuple[int, int]) -> int:
    """k x share, rounded half up."""
    numerator, denominator = share
    return (2 * k * numerator + denominator) // (2 * denominator)


def open_dataset(
    source: str | Path | Sequence[str] | Mapping[str, float], sequence_length: int, seed: int
) -> TokenDataset | Blend:
    """Open what the configuration names under data.train.

    Args:
        source: A prefix of a .bin/.idx or of shards, a glob, a list of these, or these with their weights; or a .yaml
            that lists sources.
    """
    if isinstance(source, Mapping):
        return Blend([TokenDataset(prefix, sequence_length, seed) for prefix in source], list(source.values()))
    if not isinstance(source, str | Path) or Path(source).suffix not in YAML:
        return TokenDataset(source, sequence_length, seed)
    sources = read_sources(source)
    opened = [TokenDataset(open_tokens(each.paths, each.name), sequence_length, seed) for each in sources]
    return Blend(opened, [each.weight for each in sources])
