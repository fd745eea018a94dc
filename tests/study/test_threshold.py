"""Thresholds of divergence, on trials whose truth is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_stable.study.threshold import Normal, Threshold, Trial, fit_threshold

RATES = 10 ** np.arange(-3.5, -0.4, 0.5)
SIZES = 10 ** np.array([6.0, 6.6, 7.2, 7.8])


def trials(frontier: float, slope: float, sizes: np.ndarray = SIZES) -> list[Trial]:
    """Divergence beyond a sharp frontier, log10 of it at 10^6 parameters, and its slope."""
    return [Trial(n, q, float(np.log10(q) > frontier + slope * np.log10(n / 1e6))) for n in sizes for q in RATES]


def quantiles(found: Threshold, size: float) -> np.ndarray:
    return np.quantile(found.draws(size), [0.05, 0.5, 0.95])


@pytest.mark.parametrize("slope", [0.0, -0.5])
def test_the_frontier_is_found_within_the_grid_and_followed(slope: float) -> None:
    found = fit_threshold(trials(-1.3, slope))
    for size in (1e6, 1e7, 10**8.4):
        low, median, high = quantiles(found, size)
        truth = -1.3 + slope * np.log10(size / 1e6)
        assert low < truth < high and median == pytest.approx(truth, abs=0.25)
        assert found.probability(size, 10 ** (truth - 0.75)) < 0.1 < 0.9 < found.probability(size, 10 ** (truth + 0.75))


def test_nine_in_ten_cells_of_the_largest_size_are_called_right() -> None:
    """Frontiers that scatter from size to size, and runs that do from seed to seed."""
    draw, right, firm, held = np.random.default_rng(5), [], [], []
    for slope, width, scatter, _ in itertools.product((0.0, -0.4), (0.02, 0.08), (0.0, 0.08), range(6)):
        x = np.linspace(6, 8.4, 5)
        at = draw.uniform(-2.5, -0.6) + slope * (x - 6) + scatter * draw.standard_normal(5)
        did = np.log10(RATES)[None, :, None] > at[:, None, None] + width * draw.logistic(size=(5, len(RATES), 2))
        seen = [Trial(10 ** x[i], q, float(did[i, j].mean())) for i in range(4) for j, q in enumerate(RATES)]
        found = fit_threshold(seen)
        for j, rate in enumerate(RATES):
            risk = found.probability(10 ** x[-1], rate)
            right.append((risk > 0.5) == did[-1, j, 0])
            if not 0.1 < risk < 0.9:
                firm.append(right[-1])
        low, _, high = quantiles(found, 10 ** x[-1])
        held.append(low < at[-1] + width * draw.logistic() < high)
    assert np.mean(right) >= 0.9
    assert np.mean(firm) >= 0.97 and len(firm) > 0.6 * len(right)
    assert np.mean(held) >= 0.9


def test_where_none_diverged_it_is_above_and_where_all_did_below() -> None:
    none, every = (fit_threshold([Trial(n, q, did) for n in SIZES for q in RATES]) for did in (0.0, 1.0))
    assert quantiles(none, SIZES[-1])[0] > np.log10(RATES[-1]) - 0.1
    assert quantiles(every, SIZES[-1])[2] < np.log10(RATES[0]) + 0.1


def test_order_of_trials_changes_nothing() -> None:
    seen = trials(-1.3, -0.2)
    assert np.array_equal(fit_threshold(seen[::-1]).draws(1e8), fit_threshold(seen).draws(1e8))


def test_a_level_that_is_known_beforehand_gives_way_to_what_is_seen() -> None:
    known = Normal(4.0, 1.0)
    untold = quantiles(fit_threshold([Trial(1e6, 10.0, 0.0)], known), 1e9)
    assert untold[1] == pytest.approx(4.0, abs=0.2) and untold[2] - untold[0] == pytest.approx(3.3, abs=0.5)
    levels = 10 ** np.linspace(1, 4, 13)
    told = quantiles(fit_threshold([Trial(1e6, level, float(level > 300)) for level in levels], known), 1e9)
    assert told[0] < np.log10(300) < told[2] and told[2] - told[0] < 1


def test_risk_of_a_level_that_is_itself_uncertain() -> None:
    found = fit_threshold([Trial(1e6, q, float(q > 0.01)) for q in RATES], Normal(-2.0, 1.0))
    sure = found.probability(1e6, 0.1)
    spread = np.random.default_rng(0).normal(-1, 1, len(found.a))
    assert sure > 0.95 and found.probability(1e6, spread) == pytest.approx(0.8, abs=0.1)
