"""The order is a permutation, each epoch another, and costs the same at any size."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_stable.data import SampleOrder, order, permute

KEY = bytes(32)


@pytest.mark.parametrize("length", [*range(1, 40), 99, 100, 101, 1000, 1023, 1024, 1025])
def test_bijection(length: int) -> None:
    assert sorted(permute(i, length, KEY) for i in range(length)) == list(range(length))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2**100), st.data())
def test_distinct_and_in_range_at_any_length(length: int, data: st.DataObject) -> None:
    indices = data.draw(st.sets(st.integers(0, length - 1), min_size=1, max_size=20))
    images = {permute(index, length, KEY) for index in indices}
    assert len(images) == len(indices)
    assert all(0 <= image < length for image in images)


def test_out_of_range() -> None:
    for index in (-1, 10):
        with pytest.raises(IndexError):
            permute(index, 10, KEY)


def test_each_epoch_visits_everything_in_another_order() -> None:
    visits = [SampleOrder(100, seed=3).sample(k) for k in range(300)]
    assert [epoch for epoch, _ in visits] == [0] * 100 + [1] * 100 + [2] * 100
    epochs = [[index for _, index in visits[i : i + 100]] for i in (0, 100, 200)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_seed_decides() -> None:
    orders = [[SampleOrder(50, seed).sample(k)[1] for k in range(50)] for seed in (1, 2, 1)]
    assert orders[0] == orders[2] != orders[1]


def test_the_order_never_changes_between_versions() -> None:
    """A run that resumes under a later version must meet the same data."""
    assert [SampleOrder(1000, 1234).sample(k) for k in (0, 1, 999, 1000)] == [(0, 135), (0, 842), (0, 335), (1, 282)]
    assert [SampleOrder(10**12, 1234).sample(k) for k in (0, 10**12)] == [(0, 818903549728), (1, 578115664952)]


def test_looks_random() -> None:
    """Each quarter of the epoch is spread evenly over the data, and neighbours are not neighbours."""
    length = 10_000
    images = np.array([permute(i, length, KEY) for i in range(length)])
    counts = np.histogram(images[: length // 4], bins=10, range=(0, length))[0]
    assert ((counts - 250) ** 2 / 250).sum() < 30  # chi-square with 9 degrees of freedom: 0.999 quantile 27.9
    assert abs(np.corrcoef(np.arange(length), images)[0, 1]) < 0.04
    assert (np.abs(np.diff(images)) < 10).mean() < 0.005


def test_cost_does_not_grow_with_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes per sample, counted rather than timed, at 10^2 and at 2^63 and beyond."""
    calls = 0
    real = order.blake2b

    def counted(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        return real(*arguments, **options)

    monkeypatch.setattr(order, "blake2b", counted)
    costs = []
    for length in (10**2, 10**12, 2**63, 2**63 + 1, 10**30):
        tracemalloc.start()
        calls = 0
        for k in range(200):
            SampleOrder(length, seed=5).sample(k * length // 200)
        costs.append(calls / 200)
        assert tracemalloc.get_traced_memory()[1] < 200_000
        tracemalloc.stop()
    assert max(costs) < 10, costs  # 8 rounds, hardly ever a second walk, and the key once
