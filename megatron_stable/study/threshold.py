"""The level at which runs begin to diverge: of the learning rate, for each size, or of an attention logit; pure.

A run at a level diverges with the probability

    p = 1 / (1 + exp(-(level - t(N)) / s)),    t(N) = a + b·(log10 N - middle)

levels in decades. a, b and s are averaged over, weighted by how likely they make what happened. So a size all of whose
runs were stable, or all of which diverged, says on which side of its grid the threshold is, and no more than that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_stable.study.scaling import DRAWS, Array, chosen

BEYOND = 1.5  # decades that a threshold may lie outside of the levels that were tried
STEP = 0.05  # decades between thresholds that are weighed
SLOPES = np.linspace(-1.5, 1.5, 21)  # decades of the level per decade of parameters
SLOPE = 0.5  # their standard deviation before anything is seen
WIDTHS = np.logspace(-2, -0.3, 6)  # s


class Trial(NamedTuple):
    """Runs of a size at a level: parameters, the level, and the share of them that diverged.

    Seeds of one size share what it does: together they count as one run.
    """

    size: float
    level: float
    diverged: float


class Normal(NamedTuple):
    """What is known of a threshold beforehand: log10, and the standard deviation of that."""

    mean: float
    deviation: float


@dataclass(frozen=True)
class Threshold:
    """Draws of a, b and s, ``[DRAWS]`` each."""

    middle: float
    a: Array
    b: Array
    s: Array

    def draws(self, size: float) -> Array:
        """log10 of the levels at which runs of so many parameters diverge, ``[DRAWS]``."""
        chance = (np.random.default_rng(1).permutation(DRAWS) + 0.5) / DRAWS
        return np.asarray(self._at(size) + self.s * np.log(chance / (1 - chance)))

    def probability(self, size: float, level: float | Array) -> float:
        """That a run diverges at a level, or at one of which there are draws of the base-10 logarithm."""
        level = level if isinstance(level, np.ndarray) else np.log10(level)
        return float(np.mean(1 / (1 + np.exp(np.clip((self._at(size) - level) / self.s, -500, 500)))))

    def _at(self, size: float) -> Array:
        return np.asarray(self.a + self.b * (np.log10(size) - self.middle))


def fit_threshold(trials: Iterable[Trial], known: Normal | None = None) -> Threshold:
    """The threshold of trials, of which there is one at least.

    Args:
        known: Given: one threshold for all sizes, of which that much is known. Else it goes with the size, and
            before the trials is anywhere from `BEYOND` below the lowest level to as far above the highest.
    """
    trials = sorted(trials)
    x, level = np.log10([trial.size for trial in trials]), np.log10([trial.level for trial in trials])
    middle = float(x.mean())
    ends = (level.min() - BEYOND, level.max() + BEYOND)
    if known is not None:
        ends = (min(ends[0], known.mean - 3 * known.deviation), max(ends[1], known.mean + 3 * known.deviation))
    slopes = np.zeros(1) if known is not None else SLOPES
    a, b, s = np.meshgrid(np.arange(*ends, STEP), slopes, WIDTHS, indexing="ij")
    weights = -0.5 * (b / SLOPE) ** 2
    if known is not None:
        weights = weights - 0.5 * ((a - known.mean) / known.deviation) ** 2
    for x_i, level_i, (_, _, diverged) in zip(x - middle, level, trials, strict=True):
        z = (level_i - a - b * x_i) / s
        weights = weights - diverged * np.logaddexp(0, -z) - (1 - diverged) * np.logaddexp(0, z)
    at = chosen(weights)
    spread = np.random.default_rng(2).uniform(-0.5, 0.5, (2, DRAWS))
    across = 0.0 if known is not None else SLOPES[1] - SLOPES[0]
    return Threshold(middle, a.ravel()[at] + STEP * spread[0], b.ravel()[at] + across * spread[1], s.ravel()[at])
