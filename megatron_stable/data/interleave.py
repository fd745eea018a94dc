"""Turns that several take in proportion to their weights, each found by itself, without a list of those before.

The first takes its share of all turns, rounded, so spread evenly; the second its share of what is left; and so on.
With p_i the share of the i-th in all, R_i = p_{i+1} + ... + p_n, and d_i in [-1/2, 1/2] what rounding adds, of k turns
it has ::

    c_i = (k - c_1 - ... - c_{i-1}) p_i / R_{i-1} + d_i

and k R_i + r_i are left. So r_i = r_{i-1} R_i / R_{i-1} - d_i, which is -R_i (d_1/R_1 + ... + d_i/R_i), and ::

    c_i - k p_i = d_i + r_{i-1} p_i / R_{i-1} = d_i - p_i (d_1/R_1 + ... + d_{i-1}/R_{i-1})

As p_i <= R_j for j < i, and nothing is rounded for the last, all counts are within (n - 1)/2 of k p_i, for ever; if all
but the last have tiny weights, and are rounded up at once, the last comes close to that.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from itertools import accumulate
from math import isfinite

from megatron_stable.errors import ConfigError


class Interleave:
    """Whose turn it is, and which of its own; O(number of names) in time and memory, in exact arithmetic.

    Raises ConfigError for a weight that is not above 0, or for none.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        if not weights:
            raise ConfigError("a blend needs datasets with a weight each; got none")
        for name, weight in weights.items():
            if not (isfinite(weight) and weight > 0):
                raise ConfigError(f"weight {weight} of {name} in the blend: it must be a number above 0")
        # 0.1 is meant to be one tenth, not the nearest binary fraction
        exact = [Fraction(repr(float(weight))) for weight in weights.values()]
        self.names = tuple(weights)
        left = [*accumulate(reversed(exact))][::-1]
        self.shares = {name: share / left[0] for name, share in zip(self.names, exact, strict=True)}
        """p_i, exactly."""
        self._shares = [(share / rest).as_integer_ratio() for share, rest in zip(exact, left, strict=True)]

    def assign(self, k: int) -> tuple[str, int]:
        """Whose turn number k (from 0) is, and how many turns it has had before."""
        for name, share in zip(self.names, self._shares, strict=True):
            before = _rounded(k, share)
            if _rounded(k + 1, share) > before:
                return name, before
            k -= before
        raise AssertionError("the last takes all that is left")

    def counts(self, k: int) -> dict[str, int]:
        """How many of the first k turns each has."""
        counts = {}
        for name, share in zip(self.names, self._shares, strict=True):
            counts[name] = _rounded(k, share)
            k -= counts[name]
        return counts


def _rounded(k: int, share: tuple[int, int]) -> int:
    """k x share, rounded half up."""
    numerator, denominator = share
    return (2 * k * numerator + denominator) // (2 * denominator)
