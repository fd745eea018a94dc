"""Series of any length in bounded memory, without losing an extreme."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_stable.analysis.report.thinning import Thinned, standing_out


def test_least_mean_and_greatest_are_those_of_each_stretch() -> None:
    values = np.random.default_rng(0).normal(size=(1000, 2))
    table = Thinned(buckets=64)
    for first in range(0, 1000, 7):  # in pieces, so that stretches double in between
        part = values[first : first + 7]
        table.add(range(first + 1, first + 1 + len(part)), ["a", "b"], part)
    assert table.width == 16 and table.last == 1000
    for column, key in enumerate(["a", "b"]):
        line = table.line(key)
        pieces = [values[i : i + 16, column] for i in range(0, 1000, 16)]
        np.testing.assert_array_equal(line.least, [piece.min() for piece in pieces])
        np.testing.assert_array_equal(line.most, [piece.max() for piece in pieces])
        np.testing.assert_allclose(line.mean, [piece.mean() for piece in pieces])
        np.testing.assert_array_equal(line.steps, [16 * i + 8.5 for i in range(63)])
        assert not line.lost.any()


def test_the_order_of_steps_does_not_matter() -> None:
    values = np.random.default_rng(1).normal(size=(300, 1))
    forth, back = Thinned(32), Thinned(32)
    forth.add(range(1, 301), ["a"], values)
    back.add(range(300, 0, -1), ["a"], values[::-1])
    for there, here in zip(forth.line("a"), back.line("a"), strict=True):
        np.testing.assert_allclose(there, here)


def test_what_is_not_finite_is_marked_and_spoils_nothing() -> None:
    table = Thinned(4)
    table.add(range(1, 9), ["a"], np.array([[1.0], [np.nan], [3], [4], [np.nan], [np.inf], [7], [8]]))
    line = table.line("a")
    np.testing.assert_array_equal(line.lost, [True, False, True, False])
    np.testing.assert_array_equal(line.mean, [1, 3.5, np.nan, 7.5])
    np.testing.assert_array_equal(line.most, [1, 4, np.nan, 8])


def test_series_that_come_later_begin_later() -> None:
    table = Thinned(8)
    table.add([1, 2], ["a"], np.ones((2, 1)))
    table.add([3], ["b", "a"], np.array([[5.0, 6.0]]))
    np.testing.assert_array_equal(table.line("b").steps, [3])
    np.testing.assert_array_equal(table.line("a").mean, [1, 1, 6])
    assert not len(table.line("c").steps)
    assert table.keys == ["a", "b"]


@pytest.mark.parametrize(("log", "peak", "dip"), [(True, 60.0, 0.02), (False, 9.0, -7.0)])
def test_a_single_step_shows_in_a_map(log: bool, peak: float, dip: float) -> None:
    """Of 10⁵ steps, in 512 stretches: one is high in a layer, one low in another, and else there is noise."""
    noise = np.random.default_rng(2).normal(1, 0.05, size=(100_000, 3))
    noise[54_321, 0], noise[54_321, 1] = peak, dip
    table = Thinned()
    table.add(range(1, 100_001), ["0", "1", "2"], noise)
    least, mean, most, _ = table.table(["0", "1", "2"])
    shown, stretch = standing_out(least, mean, most, log), 54_321 // table.width
    assert shown[0, stretch] == peak and shown[1, stretch] == dip
    others = np.delete(shown[:, : 100_000 // table.width], stretch, axis=1)
    assert np.abs(others - 1).max() < 0.05, "cells of noise show its mean, not its extremes"
