"""Batches: what each rank reads at each step, a pure function of (seed, position, skip windows)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, repeat

import numpy as np

from megatron_stable.data.check import check_ids
from megatron_stable.data.course import Course
from megatron_stable.data.dataset import Samples
from megatron_stable.data.repetition import RepetitionFilter, left_out
from megatron_stable.errors import ConfigError


class Batches:
    """Cuts a dataset into the global batches of a course, and these into micro batches for each rank.

    With `vocab_size`, every batch read is checked against it, and DataError raised for ids outside. Samples that
    `repetitive` finds are not to be predicted: see `left_out`.
    """

    def __init__(
        self,
        dataset: Samples,
        course: Course,
        micro_size: int,
        vocab_size: int | None = None,
        repetitive: RepetitionFilter | None = None,
    ) -> None:
        self.dataset, self.course, self.micro_size, self.vocab_size = dataset, course, micro_size, vocab_size
        self.repetitive = repetitive

    def samples(self, step: int) -> list[int]:
        """The samples of optimizer step `step` (from 1), over all ranks."""
        return [k for piece in self.course.samples(step) for k in piece]

    def micro_batches(self, step: int, rank: int = 0, ranks: int = 1) -> Iterator[np.ndarray]:
        """Micro batches of data-parallel rank `rank` of `ranks` at step `step`, each int64 `[b, s + 1]`.

        Micro batch m takes `micro_size` consecutive samples of the global batch from (m x ranks + rank) x micro_size
        on, so that the m-th micro batches of all ranks lie side by side. The next step's samples are prefetched.
        """
        samples = self.samples(step)
        if len(samples) % (self.micro_size * ranks):
            raise ConfigError(
                f"batch.global_size {len(samples)} is not divisible by batch.micro_size {self.micro_size} x "
                f"{ranks} data-parallel ranks"
            )
        return self._micro_batches(self._own(samples, rank, ranks), self._own(self.samples(step + 1), rank, ranks))

    def _own(self, samples: list[int], rank: int, ranks: int) -> list[list[int]]:
        """Of a batch the samples of each of the rank's micro batches."""
        size = self.micro_size
        return [samples[first : first + size] for first in range(rank * size, len(samples), ranks * size)]

    def _micro_batches(self, now: list[list[int]], then: list[list[int]]) -> Iterator[np.ndarray]:
        upcoming = chain(then, repeat([]))  # after a change of the batch size they may be fewer
        for samples, soon in zip(now, upcoming, strict=False):
            batch = np.stack([self._read(k) for k in samples])
            for k in soon:
                self.dataset.locate(k).prefetch()
            yield batch

    def _read(self, k: int) -> np.ndarray:
        location = self.dataset.locate(k)
        tokens = location.read()
        if self.vocab_size is not None:
            check_ids(tokens, self.vocab_size, location.dataset.indexed, location.start)
        return left_out(tokens) if self.repetitive is not None and self.repetitive.finds(tokens) else tokens
