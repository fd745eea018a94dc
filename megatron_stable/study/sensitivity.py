"""How a model takes to learning rates that are not the best: LR sensitivity, and the largest rate that is stable.

LR sensitivity is Wortsman et al.'s (arXiv 2309.14322, §2.2), over the learning rates η of a range::

    E_η[ min(ℓ(A(η)), ℓ0) - ℓ* ]

with the final loss ℓ(A(η)), the loss at initialisation ℓ0, and ℓ*, the least loss of the range. The expectation is the
plain mean over a grid that is even in log η: a sum over n rates, divided by n.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_stable.errors import ConfigError
from megatron_stable.numbers import finite
from megatron_stable.study.criteria import HOLDS, Criterion, best_of
from megatron_stable.study.table import RATE, SEED, Row, axes

DRAWS, CONFIDENCE, FEWEST = 10_000, 0.95, 3  # of the bootstrap; seeds that an interval needs
EVEN = 1.5  # the widest step of an even grid over its narrowest, in log η: 1, 3, 10 has 1.1, and 1, 2, 5, 10 has 1.3

Values = NDArray[np.number[Any]]


class Group(NamedTuple):
    """Runs that differ in learning rate and seed alone.

    Attributes:
        name: Its values, in words.
        values: Of the other axes.
        curves: By seed, the run at each learning rate of the sweep; ``None``: there is none.
    """

    name: str
    values: dict[str, Any]
    curves: dict[Any, list[Row | None]]

    @property
    def rows(self) -> list[Row]:
        """Its runs."""
        return [row for curve in self.curves.values() for row in curve if row is not None]

    @property
    def parameters(self) -> int | None:
        """In the blocks of its model."""
        return next((row["parameters"] for row in self.rows if row.get("parameters")), None)


class Estimate(NamedTuple):
    """A mean over seeds.

    Attributes:
        value: ``None``: nothing is known of it.
        interval: Percentile bootstrap over seeds; ``None``: too few seeds, or a bound.
        missing: Runs whose loss is not known; if there are any, ``value`` is a lower bound.
    """

    value: float | None
    interval: tuple[float, float] | None
    missing: int


class Best(NamedTuple):
    """The learning rate whose mean loss over seeds is the least."""

    loss: float
    rate: float


class Largest(NamedTuple):
    """The largest stable learning rate: the largest up to which at least half of the seeds are stable.

    Places are indices of the sweep's learning rates; -1 is below the smallest, and as many as there are rates is above
    the largest. Where runs are missing, or the grid ends before a run diverged, the place is one of several.

    Attributes:
        place: The least and the greatest place that it may have.
        interval: Places, of the percentile bootstrap over seeds; ``None``: too few seeds.
        first: Place of the smallest rate at which a run diverged; ``None``: none did.
        monotone: Whether no seed is stable at a rate above one at which it diverged.
    """

    place: tuple[int, int]
    interval: tuple[int, int] | None
    first: int | None
    monotone: bool


def rates_of(rows: Sequence[Row]) -> list[float]:
    """The learning rates of a sweep, rising."""
    return sorted({float(row[RATE]) for row in rows})


def unevenness(rates: Sequence[float]) -> float:
    """The widest step of a grid over its narrowest, in log η; a plain mean wants one below ``EVEN``."""
    steps = np.diff(np.log(rates))
    return float(steps.max() / steps.min()) if steps.size else 1.0


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """The groups of a sweep, in the order of its rows. ConfigError: two of its runs are alike on all axes."""
    rates, others = rates_of(rows), [axis for axis in axes(rows) if axis not in (RATE, SEED)]
    groups: dict[str, Group] = {}
    for row in rows:
        values = {axis: row.get(axis) for axis in others}
        name = " · ".join(word(axis, value) for axis, value in values.items()) or "all runs"
        group = groups.setdefault(json.dumps(values), Group(name, values, {}))
        curve = group.curves.setdefault(row.get(SEED), [None] * len(rates))
        place = rates.index(float(row[RATE]))
        if (twin := curve[place]) is not None:
            raise ConfigError(f"the runs {twin['name']} and {row['name']} are alike on all axes: leave one out")
        curve[place] = row
    return list(groups.values())


def word(axis: str, value: Any) -> str:
    """A value of an axis, in words: a text speaks for itself, a number needs its name."""
    return value if isinstance(value, str) else f"{axis.rpartition('.')[2].replace('_', ' ')} {json.dumps(value)}"


def score(row: Row | None) -> float | None:
    """min(ℓ(A(η)), ℓ0) of a run; ``None``: it is not known."""
    return None if row is None else finite(row["score"])


def lr_sensitivity(scores: Sequence[float | None]) -> tuple[float | None, int]:
    """LR sensitivity of one curve, and how many of its scores are missing.

    A score that is missing counts as if it were the least of the others, which makes the sum as small as it can be: the
    sensitivity is at least what comes out.

    Args:
        scores: min(ℓ(A(η)), ℓ0) at each rate of the grid, nats per token.
    """
    known = [each for each in scores if each is not None]
    missing = len(scores) - len(known)
    if not known or len(scores) < 2:
        return None, missing
    return sum(each - min(known) for each in known) / len(scores), missing


def sensitivity(group: Group) -> Estimate:
    """LR sensitivity of each seed's curve, and their mean over the seeds of which anything is known."""
    found = [lr_sensitivity([score(row) for row in curve]) for curve in group.curves.values()]
    values = [value for value, _ in found if value is not None]
    missing = sum(count for value, count in found if value is not None)
    if not values:
        return Estimate(None, None, sum(count for _, count in found))
    return Estimate(float(np.mean(values)), None if missing else bootstrap(values, _mean), missing)


def best(group: Group) -> Best | None:
    """Its best learning rate; ``None``: nothing is known of its losses."""
    found = []
    for runs in zip(*group.curves.values(), strict=True):
        scores = [known for row in runs if (known := score(row)) is not None]
        if scores:
            found.append(Best(float(np.mean(scores)), next(float(row[RATE]) for row in runs if row is not None)))
    return min(found, default=None)


def largest_stable(group: Group, criterion: Criterion = HOLDS) -> Largest:
    """The largest stable learning rate of a group."""
    verdicts = verdicts_of(group, criterion)
    at_least, at_most = places(verdicts)
    low, high = bootstrap(at_least, _middle), bootstrap(at_most, _middle)
    return Largest(
        (int(_middle(at_least)), int(_middle(at_most))),
        None if low is None or high is None else (int(low[0]), int(high[1])),
        min((curve.index(True) for curve in verdicts if True in curve), default=None),
        all(False not in curve[curve.index(True) :] for curve in verdicts if True in curve),
    )


def verdicts_of(group: Group, criterion: Criterion = HOLDS) -> list[list[bool | None]]:
    """Of each seed, whether its run diverged at each learning rate; ``None``: that is not known."""
    best = best_of(group.rows)
    return [[None if row is None else criterion.judge(row, best) for row in curve] for curve in group.curves.values()]


def places(verdicts: Sequence[Sequence[bool | None]]) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """Least and greatest place of each seed's last rate before the first that diverged: what is stable all the way."""
    known = [next((i for i, verdict in enumerate(curve) if verdict is not False), len(curve)) - 1 for curve in verdicts]
    possible = [curve.index(True) - 1 if True in curve else len(curve) for curve in verdicts]
    return np.array(known), np.array(possible)


def bootstrap(values: Sequence[float] | Values, statistic: Callable[[Values], Values]) -> tuple[float, float] | None:
    """Percentile interval of a statistic over seeds, drawn with replacement; ``None``: of too few seeds.

    Args:
        values: One for each seed.
        statistic: From ``[..., n]`` to ``[...]``.
    """
    n = len(values)
    if n < FEWEST:
        return None
    draws = np.asarray(values)[np.random.default_rng(0).integers(n, size=(DRAWS, n))]
    tails = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
    low, high = np.quantile(statistic(draws), tails, method="inverted_cdf")
    return float(low), float(high)


def _mean(values: Values) -> Values:
    return np.asarray(values.mean(-1))


def _middle(values: Values) -> Values:
    """The lower median: what at least half of the seeds reach."""
    return np.asarray(np.sort(values, -1)[..., (values.shape[-1] - 1) // 2])


class Robustness(NamedTuple):
    """What another criterion makes of the order of groups by their largest stable rate.

    Attributes:
        places: Of each group, as :class:`Largest` has them.
        apart: Pairs of groups that the criterion of the page tells apart.
        reversed: Those of them that come in the other order.
        alike: Those of them that come out as equal.
    """

    criterion: Criterion
    places: list[tuple[int, ...]]
    apart: int
    reversed: int
    alike: int


def robustness(groups: Sequence[Group], criterion: Criterion) -> Robustness:
    """Judge the groups by another criterion, and compare."""
    here, there = (
        [tuple(int(_middle(each)) for each in places(verdicts_of(group, rule))) for group in groups]
        for rule in (HOLDS, criterion)
    )
    pairs = [(i, j) for i in range(len(groups)) for j in range(len(groups)) if here[i][1] < here[j][0]]
    turned = sum(there[j][1] < there[i][0] for i, j in pairs)
    kept = sum(there[i][1] < there[j][0] for i, j in pairs)
    return Robustness(criterion, there, len(pairs), turned, len(pairs) - turned - kept)
