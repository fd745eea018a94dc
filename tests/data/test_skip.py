"""Skip windows against the definition, spelled out sample by sample."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_stable.data import SkipWindows
from megatron_stable.data.skip import merged
from megatron_stable.errors import ConfigError

STRETCHES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)).map(lambda w: (w[0], w[0] + w[1])), max_size=8)


@settings(deadline=None)
@given(STRETCHES, st.integers(0, 99), st.integers(1, 40))
def test_equals_the_definition(stretches: list[tuple[int, int]], first: int, count: int) -> None:
    skip = SkipWindows(stretches)
    skipped = {k for start, end in stretches for k in range(start, end)}
    kept = [k for k in range(300) if k not in skipped]
    assert [skip.sample(i) for i in range(len(kept))] == kept
    for sample in range(300):
        assert (sample in skip) == (sample in skipped)
        assert skip.kept(sample) == sum(k < sample for k in kept)
    pieces = skip.take(first, count)
    assert [k for piece in pieces for k in piece] == kept[first : first + count]
    assert all(a.stop < b.start for a, b in pairwise(pieces)), "as few as can be, none empty"


@settings(deadline=None)
@given(STRETCHES)
def test_merged_sorted_and_independent_of_order(stretches: list[tuple[int, int]]) -> None:
    skip = SkipWindows(stretches)
    assert all(a[1] < b[0] for a, b in pairwise(skip.stretches))
    assert skip == SkipWindows(reversed(stretches)) == SkipWindows([*skip.stretches, *stretches])
    assert hash(skip) == hash(SkipWindows(reversed(stretches)))


def test_example() -> None:
    skip = SkipWindows([(10, 20), (2, 4), (4, 5)])
    assert skip.stretches == ((2, 5), (10, 20))
    assert [skip.sample(i) for i in (0, 1, 2, 6, 7)] == [0, 1, 5, 9, 20]
    assert skip.take(5, 4) == (range(8, 10), range(20, 22))
    assert repr(skip) == "SkipWindows([[2, 5], [10, 20]])"


def test_continued() -> None:
    """What was trained on stays so, what was skipped stays skipped, and ahead the new windows hold alone."""
    trained = SkipWindows([(2, 4), (8, 9), (19, 30)])
    ahead = SkipWindows([(0, 1), (7, 12), (39, 41)])
    assert trained.continued(10, ahead).stretches == ((2, 4), (8, 9), (10, 12), (39, 41))
    assert trained.continued(0, SkipWindows([(4, 6)])).stretches == ((4, 6),)
    assert trained.continued(5, SkipWindows()).stretches == ((2, 4),)


def test_none() -> None:
    assert SkipWindows().sample(10**14) == SkipWindows().kept(10**14) == 10**14
    assert SkipWindows().take(3, 4) == (range(3, 7),)


def test_large_windows_cost_nothing() -> None:
    assert SkipWindows([(1, 10**14)]).take(0, 2) == (range(1), range(10**14, 10**14 + 1))


def test_windows_of_data_steps_are_merged() -> None:
    assert merged([(11, 20), (3, 4), (5, 5), (12, 21)]) == ((3, 5), (11, 21))


@pytest.mark.parametrize("window", [(0, 3), (5, 4), (-2, -1), (1,), (1, 2, 3), (1.0, 2), ("1", "2"), (True, 2)])
def test_windows_that_are_none(window: tuple) -> None:
    with pytest.raises(ConfigError, match="1 <= first <= last"):
        merged([window])
