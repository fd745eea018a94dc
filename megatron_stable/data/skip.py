"""Which samples are not trained on, and what that does to the count of the others."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Annotated

from pydantic import AfterValidator

from megatron_stable.errors import ConfigError
from megatron_stable.persisted import LARGEST, Count, Positive


def _ordered(window: tuple[int, int]) -> tuple[int, int]:
    if window[0] > window[1]:
        raise ValueError(f"skip window {list(window)} ends before it begins")
    return window


def _not_empty(stretch: tuple[int, int]) -> tuple[int, int]:
    if stretch[0] >= stretch[1]:
        raise ValueError(f"samples {list(stretch)} are none: the second is the first one behind them")
    return stretch


Window = Annotated[tuple[Positive, Positive], AfterValidator(_ordered)]
"""First and last data step that are skipped, counted from 1: how people name them."""
Stretch = Annotated[tuple[Count, Count], AfterValidator(_not_empty)]
"""Samples of the data order, from the first, counted from 0, to the one behind the last: what holds."""


def merged(windows: Iterable[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """Windows of data steps, inclusive, in order and without overlaps. Raises ConfigError for a window that is none."""
    stretches = SkipWindows((first - 1, last) for first, last in map(_checked, windows))
    return tuple((first + 1, end) for first, end in stretches.stretches)


class SkipWindows:
    """An immutable set of samples that are not trained on: stretches [first, end), merged and sorted.

    What is left, in order, are the kept samples; they are counted from 0, as samples are.
    """

    def __init__(self, stretches: Iterable[Sequence[int]] = ()) -> None:
        found: list[list[int]] = []
        for first, end in sorted(map(tuple, stretches)):
            if found and first <= found[-1][1]:
                found[-1][1] = max(end, found[-1][1])
            else:
                found.append([first, end])
        self.stretches: tuple[tuple[int, int], ...] = tuple((first, end) for first, end in found)
        self._firsts = [first for first, _ in found]
        self._skipped = [0, *accumulate(end - first for first, end in found)]
        """[i]: samples in the first i stretches."""
        self._kept = [first - skipped for first, skipped in zip(self._firsts, self._skipped, strict=False)]
        """[i]: kept samples before stretch i; strictly increasing."""

    def sample(self, kept: int) -> int:
        """The kept sample of this number; O(log stretches)."""
        return kept + self._skipped[bisect_right(self._kept, kept)]

    def kept(self, sample: int) -> int:
        """How many samples before this one are kept; O(log stretches)."""
        i = bisect_left(self._firsts, sample)
        skipped = self._skipped[i]
        if i:  # of a stretch that it lies in, only the part before it
            skipped -= max(0, self.stretches[i - 1][1] - sample)
        return sample - skipped

    def take(self, kept: int, count: int) -> tuple[range, ...]:
        """The samples that are kept as number `kept` and on, `count` of them."""
        sample, pieces = self.sample(kept), []
        i = bisect_left(self._firsts, sample)
        while i < len(self.stretches) and self._firsts[i] < sample + count:
            first, end = self.stretches[i]
            pieces.append(range(sample, first))
            count -= first - sample
            sample, i = end, i + 1
        return (*pieces, range(sample, sample + count))

    def continued(self, position: int, ahead: SkipWindows) -> SkipWindows:
        """These before sample `position`, up to which a run has trained, and those `ahead` from there on.

        What was trained on cannot be skipped any more, and what was skipped stays skipped: no count changes.
        """
        past = [(first, min(end, position)) for first, end in self.stretches if first < position]
        future = [(max(first, position), end) for first, end in ahead.stretches if end > position]
        return SkipWindows([*past, *future])

    def __contains__(self, sample: int) -> bool:
        i = bisect_right(self._firsts, sample)
        return i > 0 and sample < self.stretches[i - 1][1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SkipWindows) and self.stretches == other.stretches

    def __hash__(self) -> int:
        return hash(self.stretches)

    def __repr__(self) -> str:
        return f"SkipWindows({[list(stretch) for stretch in self.stretches]})"


def _checked(window: Sequence[int]) -> tuple[int, int]:
    whole = all(isinstance(edge, int) and not isinstance(edge, bool) for edge in window)
    if len(window) != 2 or not whole or not 1 <= window[0] <= window[1] < LARGEST:
        raise ConfigError(
            f"skip window {list(window)}: give [first, last] data steps with 1 <= first <= last < {LARGEST}"
        )
    return window[0], window[1]
