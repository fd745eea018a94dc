"""LR sensitivity and the largest stable learning rate: against published numbers, and where cells are missing."""

from __future__ import annotations

import csv
from math import isnan, nan
from pathlib import Path

import numpy as np
import pytest

from megatron_stable.errors import ConfigError
from megatron_stable.study.criteria import HOLDS, OTHERS, Best, best_of, by_lack, by_rise, by_start, diverged
from megatron_stable.study.sensitivity import (
    best,
    bootstrap,
    groups_of,
    largest_stable,
    lr_sensitivity,
    robustness,
    sensitivity,
    unevenness,
)
from tests.study.made import INITIAL, RATES, run, sweep

PUBLISHED = Path(__file__).parents[1] / "reference" / "lr_losses.csv"


def test_the_sensitivities_of_a_published_table() -> None:
    """Losses and sensitivities of a reproduction of arXiv 2309.14322; its authors divide the sum of seven by six."""
    with PUBLISHED.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    for row in rows:
        losses = [float(row[rate]) for rate in ("3e-4", "1e-3", "3e-3", "1e-2", "3e-2", "1e-1", "3e-1")]
        value, missing = lr_sensitivity(losses)
        assert (value, missing) == (pytest.approx(float(row["published"]) * 6 / 7, abs=1.1e-3), 0), row


def test_a_missing_cell_makes_a_bound() -> None:
    assert lr_sensitivity([1.0, 2.0, 4.0, None]) == (1.0, 1)
    for least in (0.0, 0.5, 1.0, 3.0, 9.0):
        whole, _ = lr_sensitivity([1.0, 2.0, 4.0, least])
        assert whole is not None and whole >= 1.0
    assert lr_sensitivity([None, None]) == (None, 2) and lr_sensitivity([1.0]) == (None, 0)

    rows = [run(f"{seed}-{rate}", rate, 3.0 + rate, seed) for seed in (1, 2, 3) for rate in (0.1, 0.3)]
    (group,) = groups_of(rows)
    assert sensitivity(group) == (pytest.approx(0.1), (pytest.approx(0.1), pytest.approx(0.1)), 0)
    (group,) = groups_of([*rows[:-1], run("lost", 0.3, None, 3)])
    assert sensitivity(group) == (pytest.approx(0.2 / 3), None, 1)
    (group,) = groups_of(rows[:-1])
    assert sensitivity(group).missing == 1  # a row that is not there is missing, too


def test_a_sweep_with_three_seeds() -> None:
    groups = {group.name: group for group in groups_of(sweep())}
    assert list(groups)[:3] == ["d64 · baseline", "d64 · qk_norm", "d128 · baseline"]
    known = {name: largest_stable(group) for name, group in groups.items()}
    # two seeds diverge above the edge, the third at three times of it
    assert known["d64 · baseline"] == ((5, 5), (5, 7), 6, True)
    assert known["d256 · baseline"] == ((3, 3), (3, 4), 4, True)
    assert known["d64 · qk_norm"] == ((6, 7), (6, 7), None, True)  # the grid ends before a run diverges
    group = groups["d256 · baseline"]
    assert best(group) == (pytest.approx(6 - 0.35 * np.log10(6_291_456) + 0.008), 3e-3)
    per_seed = [lr_sensitivity([row["score"] for row in curve if row])[0] for curve in group.curves.values()]
    found = sensitivity(group)
    assert found.value == pytest.approx(np.mean(per_seed)) and found.interval == (
        pytest.approx(min(per_seed)), pytest.approx(max(per_seed)),
    )  # fmt: skip


def spans(*scores: float | None) -> tuple[tuple[int, int], int | None, bool]:
    (group,) = groups_of([run(str(i), RATES[i], score) for i, score in enumerate(scores)])
    found = largest_stable(group)
    assert found.interval is None
    return found.place, found.first, found.monotone


def test_the_largest_stable_rate_of_a_curve() -> None:
    high = INITIAL
    assert spans(4, 4, high, high) == ((1, 1), 2, True)
    assert spans(4, high, 4, high) == ((0, 0), 1, False)  # what comes back above is not stable
    assert spans(high, 4) == ((-1, -1), 0, False)
    assert spans(4, 4) == ((1, 2), None, True)
    assert spans(4, None, 4, high) == ((0, 2), 3, True)  # somewhere among them
    assert spans(4, None, high, high) == ((0, 1), 2, True)
    assert spans(None, None) == ((-1, 2), None, True)


def test_when_a_run_counts_as_diverged() -> None:
    three = Best(3.0, 0.01)
    finished, row = run("a", 0.1, 3.0), run("b", 0.1, INITIAL)
    assert (
        diverged(finished, three) is False
        and diverged(row, three) is True
        and diverged(run("c", 0.1, None), three) is None
    )
    assert diverged(finished | {"rise": 0.1}, three) is True and diverged(finished | {"rise": 0.1}, three, 0.2) is False
    best = (3.0 - INITIAL / 3) / (2 / 3)  # of which the run lacks a third
    assert diverged(finished, Best(best - 0.01, 0.01)) is True and diverged(finished, Best(best + 0.01, 0.01)) is False
    assert diverged(finished, Best(best - 0.01, 0.3)) is False  # too low a learning rate is slow, not unstable
    assert diverged(finished | {"rise": 0.1}, Best(best - 0.01, 0.3)) is True
    assert diverged(finished | {"loss": None}, three) is True and diverged(finished, Best(nan, nan)) is False
    assert best_of([finished, row, run("c", 0.1, None)]) == (3.0, 0.1) and isnan(best_of([]).score)
    assert by_rise(0.5).judge(row | {"rise": 0.2}, Best(2.0, 0.01)) is False
    assert by_rise(0.5).judge(row | {"rise": 0.2, "steps": 150}, Best(2.0, 0.01)) is True  # it could not go on
    assert by_rise(0.5).judge(row | {"rise": None}, Best(2.0, 0.01)) is True
    assert by_lack(0.5).judge(finished, Best(6.0 - INITIAL - 0.01, 0.01)) is True
    assert by_lack(0.5).judge(finished, Best(6.0 - INITIAL + 0.01, 0.01)) is False
    assert by_start().judge(finished, Best(2.0, 0.01)) is False and by_start().judge(row, Best(2.0, 0.01)) is True
    assert all(criterion.judge(run("c", 0.1, None), Best(2.0, 0.01)) is None for criterion in (HOLDS, *OTHERS))


def test_what_another_criterion_makes_of_the_order() -> None:
    def curve(recipe: str, rises: list[float]) -> list[dict[str, object]]:
        return [run(f"{recipe}{i}", RATES[i], 3.0, recipe=recipe) | {"rise": rise} for i, rise in enumerate(rises)]

    groups = groups_of(curve("a", [0, 0.12, 0.12]) + curve("b", [0, 0, 0.6]) + curve("c", [0, 0, 0]))
    same = robustness(groups, by_rise(0.1))
    assert (same.places, same.apart, same.reversed, same.alike) == ([(0, 0), (1, 1), (2, 3)], 3, 0, 0)
    loose = robustness(groups, by_rise(0.5))  # a passes b, and is not told from c
    assert (loose.places, loose.apart, loose.reversed, loose.alike) == ([(2, 3), (1, 1), (2, 3)], 3, 1, 1)


def test_the_bootstrap() -> None:
    def mean(values: np.ndarray) -> np.ndarray:
        return np.asarray(values.mean(-1))

    assert bootstrap([1.0, 2.0], mean) is None
    values = np.random.default_rng(1).normal(10, 2, 400)
    found = bootstrap(values, mean)
    assert found is not None
    low, high = found
    assert (low, high) == bootstrap(values, mean)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_the_grid_and_twins() -> None:
    assert unevenness(RATES) == pytest.approx(np.log(1 / 0.3) / np.log(3)) and unevenness([1e-3]) == 1.0
    assert unevenness([1e-3, 1e-2, 2e-2]) > 3
    with pytest.raises(ConfigError, match="first and second are alike"):
        groups_of([run("first", 0.1, 3.0), run("second", 0.1, 3.0)])
    (group,) = groups_of([run("a", 0.1, 3.0, weight=1), run("b", 0.3, 3.0, weight=1)])
    assert group.name == "weight 1"
