"""How series grow within a run, and when each passes a threshold if it goes on so.

A series y, logarithms as a rule, is looked at at several paces: the last 32 measurements, the last 32 means of two, of
four, and so on, so that what comes within a hundred steps and what takes the whole run are both seen, in memory that
grows with the logarithm of the run's length. At each pace two laws are fitted to the later half, robustly:

    y = a + b t             exponential growth: as fast as it has been of late
    y = a + b log(t - t0)   a power of the time since t0, where the earlier half began: ever slower

What diverges lies between them as a rule, so the threshold is passed between the earliest time that the first law
allows and the latest that the second does; docs/warnings.md says how often that held.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ROWS = 32  # measurements, or means of them, of a pace
LEAST = 6  # behind a fit
WIDTH = 3.0  # standard errors to either side: laws are never quite those of the series
HUBER = 1.5  # standard deviations from where on a residual weighs less
ROUNDS = 3  # of weighing anew
STEADY = 0.9  # the most correlation of neighbouring residuals that is allowed for


class Window(NamedTuple):
    """What a pace has seen of late: the later half of its rows.

    Attributes:
        pace: Means of 2^pace measurements.
        start: t0, where the earlier half began, in steps.
        steps: ``[n]``, ascending.
        values: ``[n, series]``; NaN where a series was not measured.
    """

    pace: int
    start: float
    steps: Array
    values: Array


class Line(NamedTuple):
    """y = level + slope (x - middle), for each series.

    Attributes:
        error: Standard error of the slope, larger where neighbouring residuals are alike.
        noise: Standard deviation of residuals.
    """

    middle: Array
    level: Array
    slope: Array
    error: Array
    noise: Array


class Forecast(NamedTuple):
    """For each series, the step at which it passes its threshold; infinite: it does not.

    Attributes:
        at: The geometric mean of what both laws say.
        low, high: The interval about it.
        rate: How fast y grows per step, at least: the lower end of the exponential law's slope.
    """

    at: Array
    low: Array
    high: Array
    rate: Array


class History:
    """The recent past of several series at several paces.

    Args:
        series: How many there are.
    """

    def __init__(self, series: int) -> None:
        self.series = series
        self.paces: list[_Pace] = []

    def add(self, step: int, values: Array) -> Iterator[Window]:
        """Take the values ``[series]`` of a step, NaN where there are none; the windows that this has made anew."""
        pace, at, row = 0, float(step), values
        while True:
            if pace == len(self.paces):
                self.paces.append(_Pace(self.series))
            ring = self.paces[pace]
            ring.add(at, row)
            if ring.count // 2 >= LEAST:
                yield ring.window(pace)
            if ring.added % 2:
                return
            at, row = ring.last_two()
            pace += 1

    def recent(self) -> Array:
        """The last measurements, ``[n, series]``."""
        return self.paces[0].values[: self.paces[0].count] if self.paces else np.empty((0, self.series))


class _Pace:
    """The last rows, in the order of time."""

    def __init__(self, series: int) -> None:
        self.steps, self.values = np.empty(ROWS), np.empty((ROWS, series))
        self.count = self.added = 0

    def add(self, step: float, row: Array) -> None:
        if self.count == ROWS:
            self.steps[:-1], self.values[:-1] = self.steps[1:], self.values[1:]
            self.count -= 1
        self.steps[self.count], self.values[self.count] = step, row
        self.count += 1
        self.added += 1

    def last_two(self) -> tuple[float, Array]:
        (before, last), step = self.values[self.count - 2 : self.count], self.steps[self.count - 2 : self.count].mean()
        mean = np.where(np.isnan(before), last, np.where(np.isnan(last), before, (before + last) / 2))
        return float(step), mean

    def window(self, pace: int) -> Window:
        steps = self.steps[: self.count]
        spacing = (steps[-1] - steps[0]) / (self.count - 1)
        half = slice(self.count - self.count // 2, self.count)
        return Window(pace, float(steps[0] - spacing), steps[half].copy(), self.values[half].copy())


def fit(x: Array, values: Array) -> Line:
    """Lines through each column of ``values`` ``[n, series]`` over ``x`` ``[n]``, by Huber's weights.

    A column with fewer than `LEAST` numbers has NaN.
    """
    known = np.isfinite(values)
    y, x = np.where(known, values, 0.0), x[:, None]
    weights = known.astype(float)
    count = known.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        for _ in range(ROUNDS):
            total = weights.sum(0)
            middle, level = (weights * x).sum(0) / total, (weights * y).sum(0) / total
            off = x - middle
            spread = (weights * off * off).sum(0)
            slope = (weights * off * (y - level)).sum(0) / spread
            rest = np.where(known, y - level - slope * off, 0.0)
            noise = np.sqrt((weights * rest * rest).sum(0) / np.maximum(count - 2, 1))
            weights = known / np.maximum(np.abs(rest) / (HUBER * np.maximum(noise, 1e-12)), 1.0)
        alike = np.clip((rest[1:] * rest[:-1]).sum(0) / np.maximum((rest * rest).sum(0), 1e-30), 0.0, STEADY)
        error = noise / np.sqrt(spread) * np.sqrt((1 + alike) / (1 - alike))
    line = Line(middle, level, slope, error, noise)
    return Line(*(np.where(count >= LEAST, part, np.nan) for part in line))


def forecast(window: Window, thresholds: Array) -> Forecast:
    """When each series of a window, rising, passes its threshold ``[series]``."""
    exponential = fit(window.steps, window.values)
    power = fit(np.log(window.steps - window.start), window.values)
    with np.errstate(over="ignore", invalid="ignore"):
        first, low, _ = _passed(exponential, thresholds)
        last, _, high = (window.start + np.exp(x) for x in _passed(power, thresholds))
        low, high = np.minimum(low, first), np.maximum(high, last)
        since = window.steps[0]
        at = since + np.sqrt((first - since) * (last - since))
    now = window.steps[-1]
    at, low, high = (np.where(np.isnan(x), np.inf, np.maximum(x, now)) for x in (at, low, high))
    return Forecast(at, low, high, exponential.slope - WIDTH * exponential.error)


def _passed(line: Line, thresholds: Array) -> tuple[Array, Array, Array]:
    """Where lines pass thresholds: as they are, at the steepest, and at the flattest that they may be."""

    def where(slope: Array, way: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(slope > 0, line.middle + way / slope, np.inf)

    way, wide = thresholds - line.level, WIDTH * line.error
    return (
        where(line.slope, way),
        where(line.slope + wide, way - line.noise),
        where(line.slope - wide, way + line.noise),
    )
