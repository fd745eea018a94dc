"""Skip windows against the definition, spelled out step by step."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_stable.data import SkipWindows
from megatron_stable.errors import ConfigError

WINDOWS = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 12)).map(lambda w: (w[0], w[0] + w[1])), max_size=8)


@given(WINDOWS)
def test_equals_the_definition(windows: list[tuple[int, int]]) -> None:
    skip = SkipWindows(windows)
    skipped = {d for first, last in windows for d in range(first, last + 1)}
    kept = [d for d in range(1, 200) if d not in skipped]
    assert [skip.data_step(step) for step in range(1, len(kept) + 1)] == kept
    for data_step in range(1, 200):
        assert (data_step in skip) == (data_step in skipped)
        assert skip.step(data_step) == (None if data_step in skipped else kept.index(data_step) + 1)


@given(WINDOWS)
def test_merged_sorted_and_independent_of_order(windows: list[tuple[int, int]]) -> None:
    skip = SkipWindows(windows)
    assert all(a[1] + 1 < b[0] for a, b in zip(skip.windows, skip.windows[1:], strict=False))
    one_by_one = SkipWindows()
    for first, last in reversed(windows):
        one_by_one = one_by_one.add(first, last)
    assert skip == one_by_one == SkipWindows(json.loads(json.dumps(skip.to_list())))
    assert hash(skip) == hash(one_by_one)


def test_example() -> None:
    skip = SkipWindows([(11, 20), (3, 4), (5, 5)])
    assert skip.to_list() == [[3, 5], [11, 20]]
    assert [skip.data_step(step) for step in (1, 2, 3, 7, 8)] == [1, 2, 6, 10, 21]
    assert repr(skip) == "SkipWindows([[3, 5], [11, 20]])"


def test_continued() -> None:
    """What was trained on stays so, what was skipped stays skipped, and ahead the new windows hold alone."""
    trained = SkipWindows([(3, 4), (9, 9), (20, 30)])
    assert trained.continued(10, SkipWindows([(1, 1), (8, 12), (40, 41)])).to_list() == [
        [3, 4],
        [9, 9],
        [11, 12],
        [40, 41],
    ]
    assert trained.continued(0, SkipWindows([(5, 6)])).to_list() == [[5, 6]]
    assert trained.continued(5, SkipWindows()).to_list() == [[3, 4]]


def test_adding_leaves_the_old_one_alone() -> None:
    skip = SkipWindows([(1, 2)])
    skip.add(5, 6)
    assert skip.to_list() == [[1, 2]]


def test_none() -> None:
    assert not SkipWindows()
    assert SkipWindows().data_step(10**14) == SkipWindows().step(10**14) == 10**14


def test_large_windows_cost_nothing() -> None:
    assert SkipWindows([(2, 10**14)]).data_step(2) == 10**14 + 1


@pytest.mark.parametrize("window", [(0, 3), (5, 4), (-2, -1), (1,), (1, 2, 3), (1.0, 2), ("1", "2"), (True, 2)])
def test_windows_that_are_none(window: tuple) -> None:
    with pytest.raises(ConfigError, match="1 <= first <= last"):
        SkipWindows([window])


def test_steps_count_from_one() -> None:
    with pytest.raises(ValueError, match="count from 1"):
        SkipWindows().data_step(0)
    with pytest.raises(ValueError, match="count from 1"):
        SkipWindows().step(0)
