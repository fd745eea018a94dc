"""The usual level of a series, its noise and its tail: medians of recent accepted values, in constant memory.

    level  = min(median of the last 15, median of the last 15 before those that wait, median of the last `window`)
    spread = median of the last `window` |x - level|                                                       the MAD

so the level follows a fall fast and a rise slowly. Medians, as half of the values behind them may be anything. Ranks
tell the tail as well: how high the upper part of x - level reaches over the last four windows, in units of what
Gaussian noise comes to.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice

SHORT = 15  # values behind the fast level: its median lags by 7 steps, and half a MAD is its standard error
TAILS = 4  # windows behind the tail: it takes a thousand values to see what one in a few hundred does
HIGH = 4.5  # MADs of a 98th percentile that asks for no higher threshold: that of t with 3; 3.0 for Gaussian noise
HIGHEST = 4.0  # MADs of the highest hundredth of the values above the level: 3.8 for Gaussian noise
STEEP = 3  # power: by how much farther than that single values of a tail go that stand out once in 10^5 steps
SINGLE = 6.0  # times the threshold at most: a single step this far out is a spike however high others have been


class RobustLevel:
    """What is usual, from accepted values.

    Args:
        window: Values behind level and spread.
        values: Accepted ones to start from, oldest first.
        gaps: What each had been above the level before it, oldest first; at least as many as values.
    """

    def __init__(self, window: int, values: Iterable[float] = (), gaps: Iterable[float] = ()) -> None:
        self.window = window
        self.values, self.gaps = deque(values, window), deque(gaps, TAILS * window)
        self._short = sorted(_last(self.values, SHORT))
        self._long = sorted(self.values)
        self._sizes = sorted(map(abs, _last(self.gaps, window)))

    def accept(self, x: float, gap: float) -> None:
        """Let a value in, and what it was above the level."""
        if len(self.values) >= SHORT:
            _remove(self._short, self.values[-SHORT])
        if len(self.values) == self.window:
            _remove(self._long, self.values[0])
        if len(self.gaps) >= self.window:
            _remove(self._sizes, abs(self.gaps[-self.window]))
        self.values.append(x)
        self.gaps.append(gap)
        insort(self._short, x)
        insort(self._long, x)
        insort(self._sizes, abs(gap))

    def level(self, waiting: Sequence[float] = ()) -> float | None:
        """``None`` before the first value.

        Args:
            waiting: Values that followed and are not accepted yet: the level may fall with them, but not rise.
        """
        latest = waiting[-SHORT:]
        latest = sorted([*latest, *islice(reversed(self.values), SHORT - len(latest))])
        if not self._long:
            return median(latest) if latest else None
        return min(self.fast, median(self._long), median(latest))

    @property
    def fast(self) -> float:
        """The median of the last 15 accepted values, or of as many as there are; IndexError if none."""
        return median(self._short)

    @property
    def spread(self) -> float:
        """The MAD; 0 before the first value."""
        return median(self._sizes) if self._sizes else 0.0

    def tail(self, scale: float) -> tuple[float, float]:
        """How much heavier than Gaussian the upper tail is, as two factors for a threshold, both at least 1.

        The first is for any step. The second comes on top of it for a step that stands alone: a power of how high the
        highest hundredth is (not the highest value: a few spikes that come back are no tail). It is high while few
        values have been above the level, as at first and in a fall, when little is known of their tail.

        Args:
            scale: The unit of the gaps.
        """
        gaps = sorted(self.gaps)
        above = len(gaps) - bisect_right(gaps, 0.0)
        high, highest = gaps[len(gaps) * 98 // 100] / scale, gaps[-1 - above // 100] / scale
        single = max(1.0, (max(highest, 0.0) / HIGHEST) ** STEEP, self.window / max(above, 1))
        return max(1.0, high / HIGH), min(single, SINGLE)


def median(ordered: Sequence[float]) -> float:
    """Of values in order; the upper one of two in the middle."""
    return ordered[len(ordered) // 2]


def _last(values: deque[float], count: int) -> Iterable[float]:
    return islice(values, max(len(values) - count, 0), None)


def _remove(ordered: list[float], x: float) -> None:
    del ordered[bisect_left(ordered, x)]
