"""Series of any length in bounded memory: least, mean and greatest of stretches of steps: no extreme is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BUCKETS = 512  # stretches of steps, at most: more than a chart has room to show apart
FLICKER = 3.0  # a value stands out in its stretch if it is so many times as far from the mean as is usual

Numbers = NDArray[np.floating[Any]]


class Line(NamedTuple):
    """A series, thinned; ``[n]`` each, of the stretches that hold any of it.

    Attributes:
        steps: The middle of each stretch.
        least, mean, most: Of its finite values; NaN where there are none.
        lost: Whether any of its values was not finite.
    """

    steps: Numbers
    least: Numbers
    mean: Numbers
    most: Numbers
    lost: NDArray[np.bool_]


class Thinned:
    """Any number of series by step. The stretches are a power of two long, and all as long: they double as steps come.

    Attributes:
        width: Steps of a stretch; stretch ``i`` has the steps ``i * width + 1`` to ``(i + 1) * width``.
        last: The greatest step that came.
    """

    def __init__(self, buckets: int = BUCKETS) -> None:
        self.buckets, self.width, self.last = buckets, 1, 0
        self._columns: dict[str, int] = {}
        self._least, self._most, self._total = (np.empty((buckets, 0)) for _ in range(3))
        self._count, self._lost = np.empty((buckets, 0), np.int32), np.empty((buckets, 0), bool)

    def __contains__(self, key: str) -> bool:
        return key in self._columns

    @property
    def keys(self) -> list[str]:
        """The series, in the order in which they came."""
        return list(self._columns)

    def add(self, steps: Sequence[int], keys: Sequence[str], values: Numbers) -> None:
        """Take in values, ``[n, keys]``, at steps that only rise, or only fall. NaN and infinities: was not finite."""
        at = np.maximum(np.asarray(steps) - 1, 0)
        self.last = max(self.last, int(at.max()) + 1)
        self._widen()
        at //= self.width
        starts = np.flatnonzero(np.diff(at, prepend=-1))
        cells, finite = np.ix_(at[starts], self._find(keys)), np.isfinite(values)
        least = np.minimum.reduceat(np.where(finite, values, np.inf), starts)
        most = np.maximum.reduceat(np.where(finite, values, -np.inf), starts)
        self._least[cells] = np.minimum(self._least[cells], least)
        self._most[cells] = np.maximum(self._most[cells], most)
        self._total[cells] += np.add.reduceat(np.where(finite, values, 0.0), starts)
        self._count[cells] += np.add.reduceat(finite, starts, dtype=np.int32)
        self._lost[cells] |= np.logical_or.reduceat(~finite, starts)

    def line(self, key: str) -> Line:
        """A series; one that is not there has no points."""
        column = self._columns.get(key)
        if column is None:
            return Line(np.empty(0), np.empty(0), np.empty(0), np.empty(0), np.empty(0, bool))
        there = np.flatnonzero((self._count[:, column] > 0) | self._lost[:, column])
        least, mean, most, lost = (part[there, 0] for part in self._of([column]))
        return Line(there * float(self.width) + (self.width + 1) / 2, least, mean, most, lost)

    def table(self, keys: Sequence[str]) -> tuple[Numbers, Numbers, Numbers, NDArray[np.bool_]]:
        """Least, mean, greatest, and whether any was not finite, each ``[keys, buckets]``; NaN: there is nothing."""
        least, mean, most, lost = self._of([self._columns[key] for key in keys])
        return least.T, mean.T, most.T, lost.T

    def _of(self, columns: list[int]) -> tuple[Numbers, Numbers, Numbers, NDArray[np.bool_]]:
        count = self._count[:, columns]
        there = count > 0
        mean = np.where(there, self._total[:, columns] / np.maximum(count, 1), np.nan)
        least, most = (np.where(there, part[:, columns], np.nan) for part in (self._least, self._most))
        return least, mean, most, self._lost[:, columns]

    def _find(self, keys: Sequence[str]) -> NDArray[np.intp]:
        """The columns of series; new ones are made."""
        new = [key for key in keys if key not in self._columns]
        if new:
            self._columns |= {key: len(self._columns) + i for i, key in enumerate(new)}
            for name, empty in (("_least", np.inf), ("_most", -np.inf), ("_total", 0), ("_count", 0), ("_lost", False)):
                part = getattr(self, name)
                more = np.full((self.buckets, len(new)), empty, part.dtype)
                setattr(self, name, np.concatenate([part, more], axis=1))
        return np.array([self._columns[key] for key in keys], np.intp)

    def _widen(self) -> None:
        """Double the stretches until they reach the last step."""
        while self.last > self.buckets * self.width:
            self.width *= 2
            half = self.buckets // 2
            for part, join, empty in (
                (self._least, np.minimum, np.inf),
                (self._most, np.maximum, -np.inf),
                (self._total, np.add, 0),
                (self._count, np.add, 0),
                (self._lost, np.logical_or, False),
            ):
                part[:half] = join(part[::2], part[1::2])
                part[half:] = empty


def standing_out(least: Numbers, mean: Numbers, most: Numbers, log: bool) -> Numbers:
    """One value for each stretch, ``[series, stretches]``: the mean, or an extreme that stands out from it.

    Args:
        log: Whether to judge by ratios, of values that are positive.
    """
    low, middle, high = (np.log(np.where(part > 0, part, np.nan)) if log else part for part in (least, mean, most))
    above, below = high - middle, middle - low
    with np.errstate(invalid="ignore"):
        rises, falls = (part > FLICKER * _usual(part) for part in (above, below))
        higher = rises & ~(falls & (below > above))
    return np.where(higher, most, np.where(falls, least, mean))


def _usual(distances: Numbers) -> Numbers:
    """The median of each series, ``[series, 1]``, of those that are not 0: a stretch of one value says nothing."""
    found = np.full((len(distances), 1), np.inf)
    for i, row in enumerate(distances):
        some = row[row > 0]
        found[i] = np.median(some) if some.size else np.inf
    return found
