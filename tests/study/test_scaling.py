"""Laws of size, against least squares, Student's t, and sweeps whose truth is known."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from megatron_stable.study.scaling import SIGMA, TAU, Law, Point, Prediction, fit_laws, refusal

TAU_IS_LEAST = np.isclose(TAU, TAU.min())
RATES = [10.0**-i for i in range(6)]


def points(x: np.ndarray, y: np.ndarray, seeds: int = 1, noise: float = 0.0, draw=None) -> list[Point]:
    draw = draw or np.random.default_rng(0)
    return [
        Point(10**a, seed, 10 ** (b + noise * draw.standard_normal()))
        for a, b in zip(x, y, strict=True)
        for seed in range(seeds)
    ]


def only(law: Law, keep: np.ndarray) -> Law:
    return Law(law.x, law.y, 0.0, 1.0, np.where(keep, law.log_weights, -np.inf))


def test_intervals_hold_nine_in_ten_of_what_comes() -> None:
    """Power laws and curved ones, little noise and much, the same at all learning rates or not: 360 sweeps."""
    draw, hits, widths = np.random.default_rng(5), [], {}
    for sizes, curvature, noise, uneven in itertools.product((3, 4, 5), (0.0, 0.1, 0.3), (0.03, 0.15), (False, True)):
        x, case = np.linspace(6, 6 + 0.6 * sizes, sizes + 1), []
        for _ in range(10):
            series, truth = {}, {}
            for rate in RATES:
                sigma = noise * (3 ** draw.uniform(-1, 1) if uneven else 1)
                y = 2 + draw.normal(0.4, 0.3) * (x - 6) + draw.normal(0, curvature) * (x - 6) ** 2
                series[rate] = points(x[:-1], y[:-1], 2, sigma, draw)
                truth[rate] = 10 ** (y[-1] + sigma * draw.standard_normal())
            foretold = {rate: Prediction.of(law.draws(10 ** x[-1])) for rate, law in fit_laws(series).items()}
            case += [foretold[rate].low <= truth[rate] <= foretold[rate].high for rate in RATES]
            widths.setdefault((curvature, noise), []).extend(np.log10(p.high / p.low) for p in foretold.values())
        hits.append(np.mean(case))
    assert 0.85 <= np.mean(hits) <= 0.97
    assert min(hits) > 0.7  # of each kind, from 60 numbers
    assert np.mean(widths[0.0, 0.03]) < 0.35  # decades: not by saying nothing


def test_a_line_has_students_interval() -> None:
    x, y = np.array([6.0, 7.0, 8.0, 9.0]), np.array([1.0, 1.52, 1.97, 2.51])
    law = only(fit_laws({1.0: points(x, y)})[1.0], TAU_IS_LEAST)
    low, median, high = np.log10([(p := Prediction.of(law.draws(1e10))).low, p.median, p.high])
    slope, level = np.polyfit(x, y, 1)
    deviation = np.sqrt(((y - slope * x - level) ** 2).sum() / 2)
    wide = 2.920 * deviation * np.sqrt(1 + 1 / 4 + 2.5**2 / 5)  # t of 2 degrees of freedom, 95 %
    assert median == pytest.approx(slope * 10 + level, abs=0.005)
    assert (high - median, median - low) == pytest.approx((wide, wide), rel=0.1)


def test_a_curvature_of_any_size_is_least_squares_with_a_parabola() -> None:
    x, y = np.array([6.0, 6.6, 7.3, 8.0]), np.array([1.0, 1.52, 1.97, 2.91])
    sigma = SIGMA[np.abs(SIGMA - 0.02).argmin() // SIGMA.shape[1], 0]
    law = only(fit_laws({1.0: points(x, y)})[1.0], np.isclose(TAU, TAU.max()) & np.isclose(SIGMA, sigma))
    draws, at = law.draws(10**8.7), np.vander([8.7], 3)
    assert draws.mean() == pytest.approx(np.polyval(np.polyfit(x, y, 2), 8.7), abs=0.005)
    leverage = (at @ np.linalg.inv(np.vander(x, 3).T @ np.vander(x, 3)) @ at.T).item()
    assert draws.std() == pytest.approx(sigma * np.sqrt(1 + leverage), rel=0.03)


def test_a_parabola_without_noise_is_followed() -> None:
    x = np.linspace(6, 8.4, 5)
    y = 1 + 0.3 * (x - 6) + 0.2 * (x - 6) ** 2
    found = Prediction.of(fit_laws({1.0: points(x, y)})[1.0].draws(10**9.0))
    assert np.log10(found.median) == pytest.approx(1 + 0.9 + 1.8, abs=0.03)
    assert found.low < 10**3.7 < found.high < 1.3 * found.low


def test_a_line_among_lines_is_surer_than_one_by_itself() -> None:
    x, widths = np.array([6.0, 7.0, 8.0]), np.empty((20, 2))
    for i in range(len(widths)):
        draw = np.random.default_rng(i)
        series = {rate: points(x, 0.5 * x - 2, noise=0.02, draw=draw) for rate in RATES}
        alone, among = fit_laws({1.0: series[1.0]})[1.0], fit_laws(series)[1.0]
        widths[i] = [np.log10(p.high / p.low) for p in (Prediction.of(law.draws(1e9)) for law in (alone, among))]
    assert widths[:, 1].mean() < 0.8 * widths[:, 0].mean()


def test_it_widens_with_the_distance() -> None:
    law = fit_laws({1.0: points(np.linspace(6, 8, 4), np.array([1.0, 1.3, 1.72, 2.0]))})[1.0]
    ends = [Prediction.of(law.draws(10**x)) for x in (7, 8, 8.5, 9, 9.5)]
    widths = [p.high / p.low for p in ends]
    assert widths == sorted(widths) and widths[-1] > 1.5 * widths[0]


def test_order_and_copies_of_runs_change_nothing() -> None:
    x = np.array([6.0, 7.0, 8.0, 9.0])
    series = points(x, 0.5 * x, 3, 0.1)
    whole = fit_laws({1.0: series, 2.0: series[:6]})[1.0].draws(1e10)
    mixed = series * 4
    random.Random(1).shuffle(mixed)
    assert np.array_equal(fit_laws({2.0: series[:6], 1.0: mixed})[1.0].draws(1e10), whole)


def test_many_seeds_do_not_make_up_for_sizes() -> None:
    """Sizes that scatter about the law by 0.2 decades, seeds by 0.01: a hundred seeds know no more than two."""
    x, draw = np.array([6.0, 7.0, 8.0, 9.0]), np.random.default_rng(0)
    y = 0.5 * x + np.array([0.2, -0.2, 0.2, -0.2])
    few, many = (fit_laws({1.0: points(x, y, n, 0.01, draw)})[1.0] for n in (2, 100))
    widths = [np.log10(p.high / p.low) for p in (Prediction.of(law.draws(1e10)) for law in (few, many))]
    assert widths[1] == pytest.approx(widths[0], rel=0.05)


def test_what_is_refused() -> None:
    assert "2 sizes have it, and a law needs 3" in str(refusal([1e6, 1e7], 1e8))
    assert "no size has it" in str(refusal([], 1e8)) and "one size has it" in str(refusal([1e6], 1e8))
    assert refusal([1e6, 3e6, 1e7], 1e8) is None
    assert "a factor of 11 beyond the sizes that have it, 1e+06 to 1e+07" in str(refusal([1e6, 3e6, 1e7], 1.1e8))
    assert "here, 32" in str(refusal([1e6, 1e7, 1e8], 3.3e9)) and refusal([1e6, 1e7, 1e8], 3.2e9) is None
    assert "beyond" in str(refusal([1e6, 3e6, 1e7], 5e4))
    x = np.array([6.0, 6.6, 7.2, 7.8])
    wild = fit_laws({1.0: points(x, np.array([1.0, 3.0, 0.5, 3.5]))})[1.0]
    assert "a law does not hold: fitted without one of the sizes, it misses that one by a factor of" in str(
        wild.refusal(1e8)
    )
    assert fit_laws({1.0: points(x, 0.5 * x)})[1.0].refusal(1e8) is None
    assert fit_laws({1.0: [Point(1e6, 0, 2.0)], 2.0: []}) == {}
