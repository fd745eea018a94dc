"""When a run of a sweep counts as diverged: the criterion that holds, and others to see what hangs on it.

The papers judge by eye. A program needs a rule, and one that finds two things. A run that trains and then loses what it
had learnt has a high ``rise`` (a column of the table). A run at a learning rate so high that it never learns has
nothing to lose; it is seen by what it lacks of what the same model learns at the best learning rate::

    lack = (loss - best) / (initial_loss - best)

Below the best learning rate a run lacks time, not stability, and has no lack. Both are parts of a difference of losses,
without unit, and 0 for a run as good as can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import nan
from typing import NamedTuple

from megatron_stable.numbers import finite
from megatron_stable.study.table import RATE, Row

RISE, LACK = 0.1, 1 / 3
RISES, LACKS = (0.05, 0.2, 0.5), (0.2, 0.5)  # what else to try
ENDED = ("finished", "diverged")


class Best(NamedTuple):
    """The least score of runs that differ in learning rate and seed alone, and its learning rate; NaN: none has one."""

    score: float
    rate: float


Judge = Callable[[Row, Best], bool | None]


class Criterion(NamedTuple):
    """A rule that judges a row, given the best of its group; the answer ``None``: it cannot be known."""

    name: str
    judge: Judge


def best_of(rows: Iterable[Row]) -> Best:
    """The best of runs that differ in learning rate and seed alone."""
    scores = ((score, float(row[RATE])) for row in rows if (score := finite(row["score"])) is not None)
    return Best(*min(scores, default=(nan, nan)))


def diverged(row: Row, best: Best, rise: float = RISE, lack: float = LACK) -> bool | None:
    """Whether a run diverged: it could not go on, or lost again so much of what it had learnt, or lacks so much of what
    there is to learn."""
    if row["status"] not in ENDED:
        return None
    return row["status"] == "diverged" or _at_least(row.get("rise"), rise) or _at_least(lack_of(row, best), lack)


def lack_of(row: Row, best: Best) -> float | None:
    """The part of what the best run learns that this one has not; ``None``: it is not known."""
    loss, first = row.get("loss"), row.get("initial_loss")
    if loss is None:
        return 1.0
    if float(row[RATE]) < best.rate:
        return 0.0
    return None if first is None or not best.score < first else (loss - best.score) / (first - best.score)


def by_rise(part: float) -> Criterion:
    """A run diverged that lost again such a part of what it had learnt, whatever it lacks."""
    return Criterion(f"rise ≥ {part:g}", lambda row, _: _again(row, _at_least(row.get("rise"), part)))


def by_lack(part: float) -> Criterion:
    """A run diverged that lacks such a part of what the best one has learnt, however it came to that."""
    return Criterion(f"lack ≥ {part:g}", lambda row, best: _again(row, _at_least(lack_of(row, best), part)))


def by_start() -> Criterion:
    """A run diverged that ends where it began."""
    return Criterion("loss ≥ initial", lambda row, _: _again(row, _at_least(row.get("loss"), row.get("initial_loss"))))


HOLDS = Criterion("that of this page", diverged)
OTHERS = (*map(by_rise, RISES), *map(by_lack, LACKS), by_start())


def _again(row: Row, lost: bool) -> bool | None:
    """The verdict of a criterion on a run that reached its last step; one that was stopped before stays diverged."""
    if row["status"] not in ENDED:
        return None
    stopped = row.get("rise") is None or (row.get("steps") or 0) < (row.get("run.steps") or 0)
    return lost or (row["status"] == "diverged" and stopped)


def _at_least(value: float | None, bound: float | None) -> bool:
    return value is not None and bound is not None and value >= bound
