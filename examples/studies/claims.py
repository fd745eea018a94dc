"""What the studies find of published claims: numbers seed by seed, and what they say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import sub
from statistics import median
from typing import Any, NamedTuple

from common import table

from megatron_stable.study.sensitivity import Group, lr_sensitivity, places, score, verdicts_of

Spread = tuple[float, float, float]  # over seeds: median, least, greatest


class Claim(NamedTuple):
    """A published claim, and what we found.

    Attributes:
        source: Where it was published.
        measured: Our numbers, with intervals.
        verdict: agrees, disagrees, or why neither can be said.
    """

    source: str
    claim: str
    measured: str
    verdict: str


def claims_table(claims: Iterable[Claim]) -> list[str]:
    """Claims, one to a line."""
    return table(
        ("claim", "source", "we measured", "verdict"), [(c.claim, c.source, c.measured, c.verdict) for c in claims]
    )


def tally(claims: Iterable[Claim]) -> str:
    """How many claims came to what, in words."""
    counts = Counter(claim.verdict.partition(":")[0].partition(";")[0] for claim in claims)
    return f"{sum(counts.values())} claims; " + ", ".join(
        f"{verdict}: {count}" for verdict, count in counts.most_common()
    )


def by(groups: Iterable[Group], axis: str) -> dict[str, Group]:
    """Groups by their value on an axis, numbers as ``%g`` writes them."""
    values = ((group.values[axis], group) for group in groups)
    return {value if isinstance(value, str) else f"{value:g}": group for value, group in values}


def last_stable(group: Group) -> dict[Any, int]:
    """By seed, the place in the grid of the largest learning rate up to which all are stable; -1: not the first."""
    return {seed: int(place) for seed, place in zip(group.curves, places(verdicts_of(group))[0], strict=True)}


def largest(group: Group, rates: Sequence[float]) -> dict[Any, float]:
    """By seed, the largest stable learning rate; where it is below the grid, as far below as the next is above."""
    return {
        seed: rates[place] if place >= 0 else rates[0] ** 2 / rates[1] for seed, place in last_stable(group).items()
    }  # fmt: skip


def sensitivities(group: Group) -> dict[Any, float]:
    """LR sensitivity by seed."""
    found = {seed: lr_sensitivity([score(row) for row in curve])[0] for seed, curve in group.curves.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def lows(group: Group) -> dict[Any, float]:
    """The lowest loss over learning rates, by seed."""
    found = {seed: [score(row) for row in curve] for seed, curve in group.curves.items()}
    return {seed: min(value for value in values if value is not None) for seed, values in found.items()}


def paired(here: Mapping[Any, float], there: Mapping[Any, float], how: Callable[[float, float], float] = sub) -> Spread:
    """A difference, or a ratio, seed by seed."""
    return spread([how(here[seed], there[seed]) for seed in here.keys() & there.keys()])


def spread(values: Sequence[float]) -> Spread:
    """The median over seeds, the least and the greatest."""
    return median(values), min(values), max(values)


def in_words(found: Spread, form: str = ".2g") -> str:
    """A median with its range."""
    middle, low, high = (f"{value:{form}}" for value in found)
    return f"{middle} [{low}, {high}]"


def beyond(found: Spread, bound: float, above: bool) -> str:
    """What numbers say of a claim that they are above a bound, or below."""
    _, low, high = found
    if low <= bound <= high:
        return "open: the seeds do not agree"
    return "agrees" if (low > bound) == above else "disagrees"


def not_below(found: Spread, bound: float) -> str:
    """What numbers say of a claim that they are not below a bound."""
    return "agrees" if found[1] >= bound else "disagrees" if found[2] < bound else "open: the seeds do not agree"


def within(found: Spread, low: float, high: float) -> str:
    """What numbers say of a claim of no difference, to within so much."""
    if low <= found[1] and found[2] <= high:
        return "agrees"
    return "disagrees" if found[1] > high or found[2] < low else "open: the seeds do not agree"


def together(verdicts: Iterable[str]) -> str:
    """What several verdicts come to."""
    found = set(verdicts)
    if len(found) == 1:
        return found.pop()
    return "agrees in part" if "agrees" in found else "open: the seeds do not agree"


def each_in_words(found: Mapping[str, Spread], form: str = ".2g", unit: str = " ×") -> str:
    """Several medians with their ranges."""
    return ", ".join(f"{name} {in_words(value, form)}{unit}" for name, value in found.items())
