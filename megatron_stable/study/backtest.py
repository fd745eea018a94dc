"""Would the forecast have been right? The largest size is foretold from the others, and compared with what it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_stable.errors import ConfigError
from megatron_stable.study.forecast import Cell, Forecast, forecast
from megatron_stable.study.observations import Group, Run
from megatron_stable.study.scaling import LEAST_SIZES


@dataclass(frozen=True)
class Outcome:
    """A learning rate of the largest size: what was foretold, and what came.

    Attributes:
        diverged: The share of its runs that did.
        logits: The largest attention logit of each run that has one.
    """

    cell: Cell
    diverged: float
    logits: tuple[float, ...]

    @property
    def right(self) -> bool:
        """Whether it was called more likely to diverge than not, and did in half of its runs, or neither."""
        return self.cell.risk is not None and (self.cell.risk > 0.5) == (self.diverged >= 0.5)

    @property
    def firm(self) -> bool:
        """Whether the verdict was stable or unstable, and not left open."""
        return self.cell.verdict in ("stable", "unstable")

    @property
    def held(self) -> tuple[bool, ...]:
        """For each logit, whether the interval held it; empty where there was no interval."""
        foretold = self.cell.values.get("max_logit")
        return tuple(foretold.low <= logit <= foretold.high for logit in self.logits) if foretold else ()


@dataclass(frozen=True)
class BackTest:
    """The largest size of a group, as the others foretold it."""

    group: Group
    forecast: Forecast
    outcomes: tuple[Outcome, ...]

    @property
    def came(self) -> list[Run]:
        """The runs of the largest size."""
        return [run for run in self.group.runs if run.size == self.forecast.size]


class Score(NamedTuple):
    """Over the cells of all groups: how many there are, and how many came as foretold."""

    cells: int
    right: int
    firm: int
    firm_right: int
    logits: int
    held: int


def back_test(group: Group) -> BackTest:
    """Foretell the largest size of a group from the others. ConfigError: these are too few."""
    if (sizes := len(group.sizes)) <= LEAST_SIZES:
        raise ConfigError(
            f"{group.name} has {sizes} size{'s' * (sizes > 1)}: without the largest, a forecast needs {LEAST_SIZES}; "
            "add sizes to the sweep, or leave out --leave-out-largest"
        )
    size = group.sizes[-1]
    largest = [run for run in group.runs if run.size == size]
    foretold = forecast(group.without_largest(), size, sorted({run.rate for run in largest}))
    outcomes = []
    for cell in foretold.cells:
        runs = [run for run in largest if run.rate == cell.rate]
        logits = tuple(run.values["max_logit"] for run in runs if "max_logit" in run.values)
        outcomes.append(Outcome(cell, sum(run.diverged for run in runs) / len(runs), logits))
    return BackTest(group, foretold, tuple(outcomes))


def score(tests: Sequence[BackTest]) -> Score:
    """What they come to."""
    outcomes = [outcome for test in tests for outcome in test.outcomes]
    firm = [outcome for outcome in outcomes if outcome.firm]
    held = [each for outcome in outcomes for each in outcome.held]
    right = (sum(outcome.right for outcome in each) for each in (outcomes, firm))
    return Score(len(outcomes), next(right), len(firm), next(right), len(held), sum(held))
