"""Extrapolation within a run: what grows as a law says passes the threshold within the interval."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from megatron_stable.stability.growth import LEAST, ROWS, Array, Forecast, History, Window, fit, forecast


def windows(steps: Array, values: Array) -> dict[int, Window]:
    """The last one of each pace."""
    history, last = History(values.shape[1]), dict[int, Window]()
    for step, row in zip(steps, values, strict=True):
        last |= {window.pace: window for window in history.add(int(step), row)}
    return last


def at_half(law: Array, threshold: float, noise: float, every: int, series: int) -> tuple[int, Forecast]:
    """The step in which a law of steps 1, 2 … passes a threshold, and what its first half foretells, under noises."""
    passed = int(np.argmax(law >= threshold)) + 1
    steps = np.arange(every, passed // 2 + 1, every)
    values = law[steps - 1, None] + noise * np.random.default_rng(0).standard_normal((len(steps), series))
    seen = windows(steps, values)
    return passed, forecast(seen[max(seen)], np.full(series, threshold))


def test_a_line_is_fitted_as_numpy_fits_it_and_outliers_do_not_move_it() -> None:
    x, draw = np.arange(16.0), np.random.default_rng(0)
    y = 3 + 0.5 * x + 0.01 * draw.standard_normal(16)
    line = fit(x, y[:, None])
    assert line.slope[0] == pytest.approx(np.polyfit(x, y, 1)[0], abs=2e-3)
    assert 0 < line.error[0] < 0.01
    y[5] += 20.0
    assert abs(np.polyfit(x, y, 1)[0] - 0.5) > 0.1
    assert fit(x, y[:, None]).slope[0] == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize(
    ("law", "held"),
    [(lambda t: 0.004 * t, 95), (lambda t: 2 * np.log(t) - 10, 85), (lambda t: 3 * np.log(t) - 18, 85)],
    ids=["exponential", "square", "cube"],
)
def test_the_interval_holds_the_step(law: Callable[[Array], Array], held: int, every: int) -> None:
    passed, seen = at_half(law(np.arange(1.0, 4001.0)), 5.0, 0.1, every, 100)
    assert np.isfinite(seen.high).all()
    assert ((seen.low <= passed) & (passed <= seen.high)).sum() >= held
    assert np.median(seen.high - seen.low) < 3 * passed, "what held everything would be no interval"
    assert ((seen.low <= seen.at) & (seen.at <= seen.high)).all()


def test_what_does_not_grow_is_never_passed() -> None:
    draw = np.random.default_rng(1)
    flat = draw.standard_normal((64, 50))
    falling = flat - np.arange(64)[:, None]
    for values in (flat, falling):
        for window in windows(np.arange(1, 65), values).values():
            seen = forecast(window, np.full(50, 200.0))
            assert not np.isfinite(seen.high).any()
    assert not np.isfinite(seen.at).any(), "the falling ones"


def test_the_lines_of_columns_do_not_mix_and_gaps_are_passed_over() -> None:
    steps = np.arange(1, 17)
    values = np.stack([0.5 * steps, np.full(16, np.nan), 0.1 * steps], 1)
    values[[3, 9, 12], 0] = np.nan
    values[:12, 2] = np.nan
    line = fit(steps.astype(float), values)
    assert line.slope[0] == pytest.approx(0.5) and np.isnan(line.slope[1])
    assert np.isnan(line.slope[2]), "four numbers are no line"
    assert np.isfinite(values[:, 2]).sum() < LEAST


def test_paces_hold_means_of_ever_more_measurements_and_little_memory() -> None:
    history = History(1)
    for step in range(1, 2001):
        for window in history.add(step, np.array([float(step)])):
            assert window.values[:, 0] == pytest.approx(window.steps), "a mean of values at a mean of steps"
            assert np.diff(window.steps) == pytest.approx(2.0**window.pace)
            back = window.steps[-1] - window.start
            assert window.steps[0] - window.start > back / 2 - 2.0**window.pace, "the later half"
    assert len(history.paces) == 11
    assert history.recent()[:, 0].tolist() == list(range(2001 - ROWS, 2001))


def test_a_pair_with_one_gap_is_its_other_half() -> None:
    history = History(2)
    for step, row in ((1, [np.nan, 2.0]), (2, [4.0, 4.0])):
        list(history.add(step, np.array(row)))
    assert history.paces[1].values[0].tolist() == [4.0, 3.0]
