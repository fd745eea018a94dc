"""Samples out of token streams: one dataset in shuffled windows, or several blended by weight.

Sample k is found in O(1) time and memory, from nothing but k, the seed and the stages; there is no index to build.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_stable.data.order import SampleOrder
from megatron_stable.data.shards import Listing, Tokens, list_tokens, open_listed, open_tokens
from megatron_stable.data.sources import is_file, wanted
from megatron_stable.data.stages import Paths, Stages, Stream
from megatron_stable.errors import DataError


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
    """Several datasets mixed sample by sample, each in its own order, by weights that change from stage to stage."""

    def __init__(self, datasets: Mapping[str, TokenDataset], stages: Stages) -> None:
        self.datasets, self.stages = datasets, stages
        self.sequence_length = next(iter(datasets.values())).sequence_length

    @property
    def parts(self) -> Sequence[TokenDataset]:
        """The datasets that are open."""
        return list(self.datasets.values())

    def locate(self, k: int) -> Location:
        """Where sample k (from 0) lies."""
        name, own = self.stages.locate(k)
        return self.datasets[name].locate(own)

    def sample(self, k: int) -> np.ndarray:
        """Tokens of sample k (from 0), int64 `[sequence_length + 1]`."""
        return self.locate(k).read()


def open_source(name: str, paths: Paths, sequence_length: int, seed: int) -> TokenDataset:
    """Open a source of a run."""
    return TokenDataset(open_listed(list_source(name, paths)), sequence_length, seed)


def list_source(name: str, paths: Paths) -> Listing:
    """What a source of a run consists of."""
    return list_tokens(paths, None if isinstance(paths, str) else name)


def stream_of(paths: Paths, dataset: TokenDataset) -> Stream:
    """What a run notes of a source that it has opened."""
    return Stream(paths=paths, tokens=dataset.indexed.tokens, documents=dataset.indexed.documents)


def open_stages(stages: Stages, samples: Iterable[int], sequence_length: int, seed: int) -> Blend:
    """What a run trains on, as far as these samples come from it.

    Raises:
        DataError: A source is not there, or holds something else than when the run began to read it.
    """
    names = dict.fromkeys(stages.locate(k)[0] for k in samples)
    opened = {name: open_source(name, stages.streams[name].paths, sequence_length, seed) for name in names}
    for name, each in opened.items():
        stages.require_same(name, stream_of(stages.streams[name].paths, each))
    return Blend(opened, stages)


def open_dataset(
    source: str | Path | Sequence[str] | Mapping[str, float] | None,
    sequence_length: int,
    seed: int,
    stages: Sequence[tuple[int, Mapping[str, float]]] = (),
) -> TokenDataset | Blend:
    """Open what the configuration names under data.train or data.validation.

    Args:
        source: A prefix of a .bin/.idx or of shards, a glob, a list of these, or these with their weights; or a .yaml
            that lists sources.
        stages: What it names under data.stages, for data that nobody has trained on yet.
    """
    if source is not None and not stages and not isinstance(source, Mapping) and not is_file(source):
        return TokenDataset(source, sequence_length, seed)
    paths, blends = wanted(source, stages)
    opened = {name: open_source(name, each, sequence_length, seed) for name, each in paths.items()}
    return Blend(opened, Stages.begin({name: stream_of(paths[name], each) for name, each in opened.items()}, blends))
