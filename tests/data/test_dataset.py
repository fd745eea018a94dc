"""Samples cover the stream once per epoch; blends keep their proportions."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_stable.data import Blend, TokenDataset, open_dataset
from megatron_stable.errors import ConfigError, DataError


def test_an_epoch_predicts_every_token_once(stream: Callable[..., Path]) -> None:
    dataset = TokenDataset(stream(105), 8, seed=1)
    assert dataset.windows == 13
    for epoch in (0, 1):
        samples = [dataset.sample(epoch * 13 + k) for k in range(13)]
        assert all(sample.dtype == np.int64 and sample.shape == (9,) for sample in samples)
        assert all((np.diff(sample) == 1).all() for sample in samples)
        assert sorted(int(token) for sample in samples for token in sample[1:]) == list(range(1, 105))
        assert {dataset.locate(epoch * 13 + k).epoch for k in range(13)} == {epoch}


def test_the_shortest_dataset(stream: Callable[..., Path]) -> None:
    dataset = TokenDataset(stream(9), 8, seed=1)
    assert [dataset.sample(k).tolist() for k in range(3)] == [list(range(9))] * 3


def test_dataset_shorter_than_one_sample(stream: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"has 8 tokens, one sample needs 9 .*more text or a shorter sequence_length"):
        TokenDataset(stream(8), 8, seed=1)


class Fake(TokenDataset):
    """A dataset with nothing in it, for what a blend computes by itself."""

    def __init__(self) -> None:
        self.sequence_length = 1


def blend(weights: list[float]) -> Blend:
    return Blend([Fake() for _ in weights], weights)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.integers(1, 300))
def test_counts_are_what_assign_hands_out(weights: list[float], k: int) -> None:
    mixed = blend(weights)
    counts = [0] * len(weights)
    for sample in range(k):
        part, own = mixed.assign(sample)
        assert own == counts[part]  # each dataset's own samples come in order, none left out
        counts[part] += 1
    assert mixed.counts(k) == counts


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=10), st.integers(0, 10**18))
def test_proportions_hold_for_ever(weights: list[float], k: int) -> None:
    counts = blend(weights).counts(k)
    assert sum(counts) == k
    total = sum(map(exact, weights))
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - k * exact(weight) / total) < 3  # 2.594 has been seen


def exact(weight: float) -> Fraction:
    return Fraction(repr(weight))


def test_decimal_weights_are_exact() -> None:
    assert blend([0.1, 0.2, 0.7]).counts(10**15) == [10**14, 2 * 10**14, 7 * 10**14]
    assert blend([3, 1]).counts(4000) == [3000, 1000]


def test_parts_are_interleaved() -> None:
    mixed = blend([0.5, 0.25, 0.25])
    assert all(sorted(mixed.assign(k + i)[0] for i in range(4)) == [0, 0, 1, 2] for k in range(0, 400, 4))


def test_blend_reads_its_parts(stream: Callable[..., Path]) -> None:
    a, b = stream(41, "a"), stream(81, "b")
    mixed = open_dataset({str(a): 1, str(b): 3}, 4, seed=2)
    alone = [TokenDataset(a, 4, seed=2), TokenDataset(b, 4, seed=2)]
    assert isinstance(mixed, Blend)
    for k in range(200):
        part, own = mixed.assign(k)
        assert (mixed.sample(k) == alone[part].sample(own)).all()
        assert mixed.locate(k).dataset is mixed.parts[part]
    assert isinstance(open_dataset(str(a), 4, seed=2), TokenDataset)


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_unusable_weights(stream: Callable[..., Path], weight: float) -> None:
    with pytest.raises(ConfigError, match=r"weight .* in the blend: it must be a number above 0"):
        open_dataset({str(stream(41)): weight}, 4, seed=2)


def test_empty_blend() -> None:
    with pytest.raises(ConfigError, match="a blend needs datasets"):
        open_dataset({}, 4, seed=2)
