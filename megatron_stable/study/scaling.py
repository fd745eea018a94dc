"""How a number grows with the size of a model, and where runs begin to diverge: laws with honest intervals, pure.

A law is fitted to logarithms, log10 of a value against x = log10 of parameters, for each learning rate by itself:

    y = a + b·x + c·x² + noise(σ),    c ~ N(0, τ²)

as Wortsman et al., arXiv 2309.14322, §3.3, who fit a parabola. A parabola through three sizes leaves no residual and
explodes outside of them, a line is blind to curvature; here the curvature is drawn towards zero by as much as the sweep
itself says: τ and σ are averaged over, weighted by their likelihood, that of the other learning rates included. For
τ → 0 this is least squares with a line and Student's interval, for τ → ∞ with a parabola.

Sizes are what is counted. Runs that differ in their seeds alone are replicates of a size: they say what a seed does,
and however many they are, they do not make a law surer than its sizes do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

DRAWS = 4000
INTERVAL = (0.05, 0.5, 0.95)  # low, median and high of what is said: nine in ten are between the ends
LEAST_SIZES = 3
FARTHEST = 32.0  # times the largest size: no law is followed farther, whatever the sizes span
WORST = 0.5  # decades: a law that misses the sizes it knows by more, when fitted without them, is refused
OTHERS = 1.0  # as many learning rates all others of a sweep count for together, in what they say of σ and τ

# decades, and decades per decade²; uniform in their logarithms
SIGMA, TAU = np.meshgrid(np.logspace(-3.5, 0, 22), np.logspace(-2.5, 0.25, 12), indexing="ij")


class Point(NamedTuple):
    """What a run has measured: parameters, seed, and a value, positive."""

    size: float
    seed: int
    value: float


class Prediction(NamedTuple):
    """The median of what is foretold, and the interval that holds nine in ten; in the unit of what is foretold."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, draws: Array) -> Prediction:
        """Of draws of a base-10 logarithm."""
        low, median, high = 10 ** np.quantile(draws, INTERVAL)
        return cls(float(median), float(low), float(high))


@dataclass(frozen=True)
class Law:
    """Sizes, ``[n]``, ascending, and the mean of log10(value) of each.

    Attributes:
        x: log10 of parameters.
        y: Means over seeds of log10 of the value.
        seed_variance: Of a run about the mean of its size, in decades²; of all learning rates together.
        replicates: Runs of a size, on average.
        log_weights: Of the grid of σ and τ.
    """

    x: Array
    y: Array
    seed_variance: float
    replicates: float
    log_weights: Array

    @property
    def exponent(self) -> float:
        """The power of parameters that the value grows with, at the mean of the sizes."""
        return float(np.polyfit(self.x, self.y, 1)[0])

    def refusal(self, size: float) -> str | None:
        """Why this law says nothing about a size, if so."""
        if reason := refusal(10**self.x, size):
            return reason
        if (error := self.error) > WORST:
            return (
                f"a law does not hold: fitted without one of the sizes, it misses that one by a factor of "
                f"{10**error:.2g}; {10**WORST:.2g} is allowed"
            )
        return None

    @cached_property
    def error(self) -> float:
        """Root mean square, in decades, of what the law says of each size if fitted without it, to what was there."""
        keep = ~np.eye(len(self.x), dtype=bool)
        parts = [(Law(self.x[k], self.y[k], 0.0, 1.0, self.log_weights), i) for i, k in enumerate(keep)]
        misses = [np.median(part.draws(10 ** self.x[i])) - self.y[i] for part, i in parts]
        return float(np.sqrt(np.mean(np.square(misses))))

    def draws(self, size: float) -> Array:
        """log10 of the value of a run of so many parameters, ``[DRAWS]``."""
        line = _Line(self.x, self.y)
        x = np.log10(size)
        at = chosen(self.log_weights)
        sigma, tau = SIGMA.ravel()[at], TAU.ravel()[at]
        curvature_variance = 1 / (1 / tau**2 + line.power / sigma**2)
        bend = line.off(x)
        mean = line.at(x) + curvature_variance * line.covariance / sigma**2 * bend
        variance = sigma**2 * (1 + line.leverage(x)) + curvature_variance * bend**2
        variance += self.seed_variance * (1 - 1 / self.replicates)
        noise = np.random.default_rng(0).standard_normal(DRAWS)  # the same sweep, the same forecast
        return np.asarray(mean + np.sqrt(variance) * noise)


def fit_laws(series: Mapping[float, Sequence[Point]]) -> dict[float, Law]:
    """A law for each learning rate that has two sizes or more; they lend each other σ and τ."""
    means = {rate: _by_size(points) for rate, points in sorted(series.items())}
    means = {rate: sizes for rate, sizes in means.items() if len(sizes) > 1}
    spread = [np.subtract(seeds, np.mean(seeds)) for sizes in means.values() for seeds in sizes.values()]
    freedom = sum(len(seeds) - 1 for seeds in spread)
    seed_variance = sum(float(seeds @ seeds) for seeds in spread) / freedom if freedom else 0.0
    replicates = len(np.concatenate(spread)) / len(spread) if spread else 1.0
    data = {
        rate: (np.log10(list(sizes)), np.array([np.mean(seeds) for seeds in sizes.values()]))
        for rate, sizes in means.items()
    }
    said = {rate: _Line(x, y).log_likelihood() for rate, (x, y) in data.items()}
    laws = {}
    for rate, (x, y) in data.items():
        others = [each for other, each in said.items() if other != rate]
        lent = min(OTHERS, len(others)) * np.mean(others, axis=0) if others else 0.0
        laws[rate] = Law(x, y, seed_variance, replicates, said[rate] + lent)
    return laws


def refusal(sizes: Sequence[float] | Array, size: float) -> str | None:
    """Why measurements at these sizes say nothing about another, if so."""
    if len(sizes) < LEAST_SIZES:
        have = "no size has" if not len(sizes) else "one size has" if len(sizes) == 1 else f"{len(sizes)} sizes have"
        return f"{have} it, and a law needs {LEAST_SIZES}"
    smallest, largest = min(sizes), max(sizes)
    beyond, most = max(size / largest, smallest / size), min(largest / smallest, FARTHEST)
    if beyond > most * (1 + 1e-9):
        return (
            f"{size:.3g} parameters are a factor of {beyond:.3g} beyond the sizes that have it, {smallest:.3g} to "
            f"{largest:.3g}; a law is followed no farther than these are apart, and than {FARTHEST:g}: here, {most:.3g}"
        )
    return None


def chosen(log_weights: Array) -> npt.NDArray[np.intp]:
    """Cells of a grid, each as often as its weight says, ``[DRAWS]``."""
    edges = np.cumsum(np.exp(log_weights - log_weights.max()).ravel())
    at = np.searchsorted(edges, (np.arange(DRAWS) + 0.5) / DRAWS * edges[-1])
    return at.clip(max=len(edges) - 1)


def _by_size(points: Sequence[Point]) -> dict[float, Array]:
    """log10 of the values at each size, ascending; the same seed once, by its mean."""
    seeds: dict[tuple[float, int], list[float]] = {}
    for size, seed, value in sorted(points):
        seeds.setdefault((size, seed), []).append(np.log10(value))
    sizes: dict[float, list[float]] = {}
    for (size, _), values in seeds.items():
        sizes.setdefault(size, []).append(float(np.mean(values)))
    return {size: np.array(values) for size, values in sizes.items()}


class _Line:
    """Least squares with a line, and what a parabola would add to it."""

    def __init__(self, x: Array, y: Array) -> None:
        self.x, self.middle = x, x.mean()
        self.spread = float(((x - self.middle) ** 2).sum())
        self.slope, self.level = float((x - self.middle) @ y) / self.spread, float(y.mean())
        square = x**2
        self.square_slope, self.square_level = float((x - self.middle) @ square) / self.spread, float(square.mean())
        bent, rest = self.off(x), y - self.at(x)
        self.power = float(bent @ bent)  # Σ of the part of x² that no line has, squared: 0 for two sizes
        self.covariance, self.rest = float(bent @ rest), float(rest @ rest)

    def at(self, x: Array) -> Array:
        return self.level + self.slope * (x - self.middle)

    def off(self, x: Array) -> Array:
        """How far x² is from the line through it."""
        return np.asarray(x**2 - self.square_level - self.square_slope * (x - self.middle))

    def leverage(self, x: Array) -> Array:
        """Variance of the line there, in σ²."""
        return 1 / len(self.x) + (x - self.middle) ** 2 / self.spread

    def log_likelihood(self) -> Array:
        """Of σ and τ, whatever the line: what it leaves is N(0, σ²·1 + τ²·bent·bentᵀ)."""
        signal = SIGMA**2 + TAU**2 * self.power
        misfit = (self.rest - TAU**2 * self.covariance**2 / signal) / SIGMA**2
        return np.asarray(-0.5 * (misfit + (len(self.x) - 3) * np.log(SIGMA**2) + np.log(signal)))
