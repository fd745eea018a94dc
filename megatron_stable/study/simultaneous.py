"""Intervals that hold together: of several shares, and of several treatments against one control."""

from __future__ import annotations

from collections.abc import Callable
from math import exp, inf, lgamma, log, log1p, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DRAWS = 100_000  # of the largest statistic


class Interval(NamedTuple):
    """An estimate, and bounds that together with those of its family hold with the confidence asked for."""

    value: float
    low: float
    high: float


def share(found: int, of: int, error: float) -> Interval:
    """Clopper and Pearson's exact interval (Biometrika 26, 1934) of a share, two-sided.

    Args:
        found: How many of those that were drawn have it.
        of: How many were drawn, at least one.
        error: Probability with which it may miss the truth: 0.05 divided by the shares of the family (Bonferroni).
    """
    low = _root(lambda p: 1 - _below(found - 1, of, p), error / 2) if found else 0.0
    high = _root(lambda p: -_below(found, of, p), -error / 2) if found < of else 1.0
    return Interval(found / of, low, high)


def _below(most: int, of: int, p: float) -> float:
    """P(at most so many of ``of``), each with probability 0 < p < 1."""
    terms = (
        lgamma(of + 1) - lgamma(k + 1) - lgamma(of - k + 1) + k * log(p) + (of - k) * log1p(-p)
        for k in range(most + 1)
    )  # fmt: skip
    return min(sum(map(exp, terms)), 1.0)


def _root(rising: Callable[[float], float], wanted: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) >= wanted else (middle, high)
    return (low + high) / 2


def against_control(
    values: NDArray[np.float64], error: float, censored: NDArray[np.bool_] | None = None
) -> list[Interval]:
    """What each treatment adds to a control, by Dunnett's method (JASA 50, 1955), each block with all of them.

    The noise is taken to be normal and alike in all cells; what blocks have in common drops out. Treatments of which
    all is censored show no noise, so that it is estimated from the others; if only the control is left, from the
    control, with what blocks have in common. Bounds are infinite where no noise is known: there is one block, or the
    control is censored.

    Args:
        values: ``[1 + treatments, blocks]``, the control first.
        error: Probability that any of the intervals misses.
        censored: ``[1 + treatments, blocks]``: which values only say that the truth is no less; ``None``: none.
    """
    lost = np.zeros(values.shape, bool) if censored is None else censored
    arms, blocks = values.shape
    effects = values[1:].mean(1) - values[0].mean()
    noisy = values[~lost.all(1)]
    freedom = max(len(noisy) - 1, 1) * (blocks - 1)
    if lost[0].any() or not freedom:
        return [Interval(float(effect), -inf, inf) for effect in effects]
    rest = noisy - noisy.mean(1, keepdims=True)
    if len(noisy) > 1:
        rest = rest - rest.mean(0)
    half = _critical(arms - 1, freedom, error) * sqrt(2 * float((rest**2).sum()) / freedom / blocks)
    return [Interval(float(effect), float(effect) - half, float(effect) + half) for effect in effects]


def _critical(treatments: int, freedom: int, error: float) -> float:
    """The quantile of the largest |t| of treatments that share a control."""
    draw = np.random.default_rng(0)
    normal = draw.standard_normal((treatments + 1, DRAWS))
    largest = np.abs(normal[1:] - normal[0]).max(0) / sqrt(2)
    return float(np.quantile(largest / np.sqrt(draw.chisquare(freedom, DRAWS) / freedom), 1 - error))
