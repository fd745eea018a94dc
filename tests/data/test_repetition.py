"""Samples that repeat themselves are found, as a count of every stretch finds them, and handed on marked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_stable.data import Batches, Course, IndexedWriter, RepetitionFilter, TokenDataset
from megatron_stable.data.repetition import left_out


def by_hand(tokens: list[int], times: int, shortest: int, longest: int) -> bool:
    """Whether some stretch comes so often in a row, each written down and looked for at each place."""
    for period in range(shortest, longest + 1):
        for start in range(len(tokens) - times * period + 1):
            if tokens[start : start + times * period] == tokens[start : start + period] * times:
                return True
    return False


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=40),
    st.integers(2, 6),
    st.integers(1, 4),
    st.integers(0, 4),
)
def test_what_is_found_is_what_comes_so_often(tokens: list[int], times: int, shortest: int, more: int) -> None:
    found = RepetitionFilter(times, shortest, shortest + more).finds(np.array(tokens))
    assert found == by_hand(tokens, times, shortest, shortest + more)


@pytest.mark.parametrize("period", [1, 2, 13])
@pytest.mark.parametrize("place", [0, 1, 500])
def test_the_last_repetition_decides(period: int, place: int) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.permutation(3000)[:2049]  # none comes twice
    for times, wanted in ((32, True), (31, False)):
        repeated = tokens.copy()
        repeated[place : place + times * period] = np.tile(np.arange(5000, 5000 + period), times)
        assert RepetitionFilter(32).finds(repeated) == wanted
    assert not RepetitionFilter(32, 14, 20).finds(repeated)


def test_samples_that_repeat_themselves_are_marked_and_can_be_read(tmp_path: Path) -> None:
    tokens = np.arange(81) % 60
    tokens[17:23] = 7  # within the third sample of 8
    with IndexedWriter(tmp_path / "data", np.uint16) as writer:
        writer.add(tokens)
    dataset = TokenDataset(tmp_path / "data", 8, seed=1)
    plain, filtered = (
        np.concatenate(list(Batches(dataset, Course.begin(10), 2, 60, which).micro_batches(1)))
        for which in (None, RepetitionFilter(6))
    )
    marked = (filtered < 0).all(1)
    assert marked.sum() == 1 and (plain[marked] == 7).sum() == 6
    assert (filtered[~marked] == plain[~marked]).all() and (~filtered[marked] == plain[marked]).all()
    assert (left_out(plain) < 0).all()


def test_by_default_nothing_is_marked(stream: Callable[..., Path]) -> None:
    dataset = TokenDataset(stream(1001), 8, seed=7)
    assert all((batch >= 0).all() for batch in Batches(dataset, Course.begin(12), 3).micro_batches(1))
