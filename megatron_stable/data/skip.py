"""Which data steps are not trained on, and what that does to the count of the others."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Annotated

from pydantic import AfterValidator

from megatron_stable.errors import ConfigError
from megatron_stable.persisted import LARGEST, Positive


def _ordered(window: tuple[int, int]) -> tuple[int, int]:
    if window[0] > window[1]:
        raise ValueError(f"skip window {list(window)} ends before it begins")
    return window


Window = Annotated[tuple[Positive, Positive], AfterValidator(_ordered)]
"""First and last data step that are skipped, as they are persisted."""


class SkipWindows:
    """An immutable set of windows of data steps, inclusive and counted from 1, merged and sorted.

    A data step is a position in the data order; a step is the count of data steps trained on. Without windows the two
    are equal. Raises ConfigError for a window that is none.
    """

    def __init__(self, windows: Iterable[Sequence[int]] = ()) -> None:
        merged: list[list[int]] = []
        for first, last in sorted(_checked(window) for window in windows):
            if merged and first <= merged[-1][1] + 1:
                merged[-1][1] = max(last, merged[-1][1])
            else:
                merged.append([first, last])
        self.windows: tuple[tuple[int, int], ...] = tuple((first, last) for first, last in merged)
        self._firsts = [first for first, _ in merged]
        self._skipped = [0, *accumulate(last - first + 1 for first, last in merged)]
        """[i]: data steps in the first i windows."""
        self._kept = [first - 1 - skipped for first, skipped in zip(self._firsts, self._skipped, strict=False)]
        """[i]: data steps before window i that are trained on; strictly increasing after the first."""

    def data_step(self, step: int) -> int:
        """The `step`-th data step that lies in no window; O(log windows)."""
        if step < 1:
            raise ValueError(f"steps count from 1, got {step}")
        return step + self._skipped[bisect_left(self._kept, step)]

    def step(self, data_step: int) -> int | None:
        """The inverse of `data_step`; None if this data step is skipped."""
        if data_step < 1:
            raise ValueError(f"data steps count from 1, got {data_step}")
        before = bisect_right(self._firsts, data_step)
        if before and data_step <= self.windows[before - 1][1]:
            return None
        return data_step - self._skipped[before]

    def add(self, first: int, last: int) -> SkipWindows:
        """These windows and one more."""
        return SkipWindows([*self.windows, (first, last)])

    def continued(self, position: int, ahead: SkipWindows) -> SkipWindows:
        """These windows before data step `position`, up to which a run has trained, and those `ahead` after it.

        What was trained on cannot be skipped any more, and what was skipped stays skipped: no count changes.
        """
        past = [window for window in self.windows if window[0] <= position]
        future = [(max(first, position + 1), last) for first, last in ahead.windows if last > position]
        return SkipWindows([*past, *future])

    def to_list(self) -> list[list[int]]:
        """Plain lists for JSON and YAML; the constructor takes them back."""
        return [list(window) for window in self.windows]

    def __contains__(self, data_step: int) -> bool:
        return self.step(data_step) is None

    def __bool__(self) -> bool:
        return bool(self.windows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SkipWindows) and self.windows == other.windows

    def __hash__(self) -> int:
        return hash(self.windows)

    def __repr__(self) -> str:
        return f"SkipWindows({self.to_list()})"


def _checked(window: Sequence[int]) -> tuple[int, int]:
    whole = all(isinstance(edge, int) and not isinstance(edge, bool) for edge in window)
    if len(window) != 2 or not whole or not 1 <= window[0] <= window[1] < LARGEST:
        raise ConfigError(
            f"skip window {list(window)}: give [first, last] data steps with 1 <= first <= last < {LARGEST}"
        )
    return window[0], window[1]
