"""Batches: which samples each rank reads at each step, a pure function of (seed, step, skip windows)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_stable.data.check import check_ids
from megatron_stable.data.dataset import Samples
from megatron_stable.data.skip import SkipWindows
from megatron_stable.errors import ConfigError

NO_WINDOWS = SkipWindows()


class Batches:
    """Cuts a dataset into global batches of `global_size` samples, and these into micro batches for each rank.

    With `vocab_size`, every batch read is checked against it, and DataError raised for ids outside.
    """

    def __init__(
        self,
        dataset: Samples,
        global_size: int,
        micro_size: int,
        skip: SkipWindows = NO_WINDOWS,
        vocab_size: int | None = None,
    ) -> None:
        self.dataset, self.global_size, self.micro_size = dataset, global_size, micro_size
        self.skip, self.vocab_size = skip, vocab_size

    def samples(self, step: int) -> range:
        """The samples of optimizer step `step` (from 1), over all ranks."""
        first = (self.skip.data_step(step) - 1) * self.global_size
        return range(first, first + self.global_size)

    def micro_batches(self, step: int, rank: int = 0, ranks: int = 1) -> Iterator[np.ndarray]:
        """Micro batches of data-parallel rank `rank` of `ranks` at step `step`, each int64 `[b, s + 1]`.

        Micro batch m takes `micro_size` consecutive samples of the global batch from (m x ranks + rank) x micro_size
        on, so that the m-th micro batches of all ranks lie side by side. The next step's samples are prefetched.
        """
        if self.global_size % (self.micro_size * ranks):
            raise ConfigError(
                f"batch.global_size {self.global_size} is not divisible by batch.micro_size {self.micro_size} x "
                f"{ranks} data-parallel ranks"
            )
        return self._micro_batches(self._own(step, rank, ranks), self._own(step + 1, rank, ranks))

    def _own(self, step: int, rank: int, ranks: int) -> list[range]:
        """The samples of each of the rank's micro batches."""
        samples, size = self.samples(step), self.micro_size
        return [samples[first : first + size] for first in range(rank * size, self.global_size, ranks * size)]

    def _micro_batches(self, now: list[range], then: list[range]) -> Iterator[np.ndarray]:
        for samples, upcoming in zip(now, then, strict=True):
            batch = np.stack([self._read(k) for k in samples])
            for k in upcoming:
                self.dataset.locate(k).prefetch()
            yield batch

    def _read(self, k: int) -> np.ndarray:
        location = self.dataset.locate(k)
        tokens = location.read()
        if self.vocab_size is not None:
            check_ids(tokens, self.vocab_size, location.dataset.indexed, location.start)
        return tokens
