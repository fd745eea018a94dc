"""Simultaneous intervals: against the definition, tables and simulation."""

from __future__ import annotations

from math import comb, inf, log

import numpy as np
import pytest

from megatron_stable.study.simultaneous import _critical, against_control, share


@pytest.mark.parametrize(("found", "of"), [(0, 20), (1, 20), (7, 20), (33, 128), (20, 20)])
def test_a_share_has_the_interval_of_clopper_and_pearson(found: int, of: int) -> None:
    got = share(found, of, 0.02)

    def at_most(k: int, p: float) -> float:
        return sum(comb(of, i) * p**i * (1 - p) ** (of - i) for i in range(k + 1))

    assert got.value == found / of
    # at each bound, what was seen is just improbable enough
    assert got.low == 0 if found == 0 else 1 - at_most(found - 1, got.low) == pytest.approx(0.01, rel=1e-6)
    assert got.high == 1 if found == of else at_most(found, got.high) == pytest.approx(0.01, rel=1e-6)


# Dunnett (JASA 59, 1964), two-sided: treatments, degrees of freedom, error, critical value
@pytest.mark.parametrize(
    ("treatments", "freedom", "error", "value"), [(1, 10, 0.05, 2.23), (3, 12, 0.05, 2.68), (6, 20, 0.05, 2.77)]
)
def test_critical_values_are_dunnetts(treatments: int, freedom: int, error: float, value: float) -> None:
    assert _critical(treatments, freedom, error) == pytest.approx(value, abs=0.04)


def test_all_intervals_hold_together_as_often_as_is_said() -> None:
    draw, truth = np.random.default_rng(1), np.array([0.0, 0.5, -1.0, 0.0, 2.0])
    held = 0
    for _ in range(300):
        noise = draw.standard_normal((6, 4)) + 3 * draw.standard_normal(4)  # what blocks share drops out
        found = against_control(noise + np.concatenate([[7.0], 7.0 + truth])[:, None], 0.1)
        held += all(each.low <= true <= each.high for each, true in zip(found, truth, strict=True))
    assert 0.85 <= held / 300 <= 0.95


def test_of_one_block_nothing_is_known() -> None:
    (found,) = against_control(np.array([[1.0], [3.0]]), 0.05)
    assert (found.value, found.low, found.high) == (2.0, -inf, inf)


def test_censored_arms_show_no_noise() -> None:
    """What only says "no less" must make no interval narrower; a censored control leaves nothing to compare with."""
    values = np.array([[0.1, 0.2, 0.15], [0.12, 0.1, 0.3], [2.3, 2.3, 2.3], [2.3, 2.3, 2.3]])
    lost = values > 2
    alone, known = against_control(values[:2], 0.05), against_control(values, 0.05, lost)
    assert known[0].high - known[0].low >= alone[0].high - alone[0].low
    assert all(log(1.5) < each.low < each.value < each.high for each in known[1:])
    # only the control is left to show noise
    (first, second) = against_control(values[[0, 2, 3]], 0.05, lost[[0, 2, 3]])
    assert log(1.5) < first.low == second.low < first.value
    every = against_control(np.full((3, 3), 2.3), 0.05, np.ones((3, 3), bool))
    assert all((each.low, each.high) == (-inf, inf) for each in every)
