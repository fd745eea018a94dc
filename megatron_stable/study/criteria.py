"""When a run of a sweep counts as diverged: the criterion that holds, and others to see what hangs on it.

The papers judge by eye. A program needs a rule: a run diverged that could not go on, or that at its end had lost again
a tenth of what it had learnt (the column ``rise``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from megatron_stable.study.table import Row

RISE = 0.1
THRESHOLDS = (0.05, 0.1, 0.2, 0.5)
MARGIN = 1.0  # nats per token

Judge = Callable[[Row, float], bool | None]


class Criterion(NamedTuple):
    """A rule that judges a row, given the best loss of its group; the answer ``None``: it cannot be known."""

    name: str
    judge: Judge


def diverged(row: Row, threshold: float = RISE) -> bool | None:
    """Whether a run diverged: its status says so, or it lost again ``threshold`` of what it had learnt."""
    if row["status"] not in ("finished", "diverged"):
        return None
    return row["status"] == "diverged" or _at_least(row.get("rise"), threshold)


def by_rise(threshold: float) -> Criterion:
    """A run diverged that lost again such a part of what it had learnt, whatever its status says."""
    return Criterion(f"rise ≥ {threshold:g}", lambda row, _: _again(row, _at_least(row.get("rise"), threshold)))


def by_margin(margin: float) -> Criterion:
    """A run diverged that ends so many nats above the best loss of its group."""
    return Criterion(
        f"loss ≥ best + {margin:g}", lambda row, best: _again(row, _at_least(row.get("loss"), best + margin))
    )


def by_start() -> Criterion:
    """A run diverged that ends where it began."""
    return Criterion("loss ≥ initial", lambda row, _: _again(row, _at_least(row.get("loss"), row.get("initial_loss"))))


HOLDS = Criterion("that of this page", lambda row, _: diverged(row))
OTHERS = (*map(by_rise, THRESHOLDS), by_margin(MARGIN), by_start())


def _again(row: Row, lost: bool) -> bool | None:
    """The verdict of a criterion on a run that reached its last step; one that was stopped before stays diverged."""
    if row["status"] not in ("finished", "diverged"):
        return None
    stopped = row.get("rise") is None or (row.get("steps") or 0) < (row.get("run.steps") or 0)
    return lost or (row["status"] == "diverged" and stopped)


def _at_least(value: float | None, bound: float | None) -> bool:
    return value is not None and bound is not None and value >= bound
