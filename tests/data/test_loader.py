"""Which samples each rank gets, whatever the layout; and that every batch is checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_stable.data import Batches, Course, SkipWindows, TokenDataset
from megatron_stable.errors import ConfigError, DataError


@pytest.fixture
def dataset(stream: Callable[..., Path]) -> TokenDataset:
    return TokenDataset(stream(1001), 8, seed=7)


def global_batch(batches: Batches, step: int, ranks: int) -> np.ndarray:
    """Put a step's micro batches of all ranks side by side again."""
    per_rank = [list(batches.micro_batches(step, rank, ranks)) for rank in range(ranks)]
    return np.concatenate([per_rank[rank][m] for m in range(len(per_rank[0])) for rank in range(ranks)])


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (2, 1), (12, 1), (3, 2), (1, 4), (2, 6), (1, 12)])
def test_batch_does_not_depend_on_the_layout(dataset: TokenDataset, micro: int, ranks: int) -> None:
    for step in (1, 2, 40):
        expected = np.stack([dataset.sample((step - 1) * 12 + i) for i in range(12)])
        batches = Batches(dataset, Course.begin(12), micro)
        micros = list(batches.micro_batches(step, 0, ranks))
        assert len(micros) == 12 // (micro * ranks)
        assert all(batch.shape == (micro, 9) and batch.dtype == np.int64 for batch in micros)
        assert (global_batch(batches, step, ranks) == expected).all()


def test_skip_windows_shift_the_data(dataset: TokenDataset) -> None:
    plain, skipping = (Batches(dataset, Course.begin(4, skip), 2) for skip in ([], [(3, 5)]))
    for step, data_step in ((1, 1), (2, 2), (3, 6), (4, 7)):
        assert (global_batch(skipping, step, 1) == global_batch(plain, data_step, 1)).all()
        assert skipping.samples(step) == list(range((data_step - 1) * 4, data_step * 4))


def test_indivisible_batch(dataset: TokenDataset) -> None:
    with pytest.raises(ConfigError, match=r"batch.global_size 12 is not divisible by batch.micro_size 2 x 4 data-par"):
        Batches(dataset, Course.begin(12), 2).micro_batches(1, 0, 4)


def test_every_batch_is_checked(dataset: TokenDataset) -> None:
    for batch in Batches(dataset, Course.begin(4), 2, vocab_size=1001).micro_batches(1):
        assert batch.max() < 1001
    bad = Batches(dataset, Course.begin(125), 125, vocab_size=500)
    with pytest.raises(DataError, match="tokenizer and data do not match"):
        list(bad.micro_batches(1))


def test_a_change_of_the_batch_size_between_two_steps(dataset: TokenDataset) -> None:
    """The last batch of the old size has been read when the first of the new one is fetched ahead, and back."""
    course = Course.begin(4).resumed(2, 12, [], SkipWindows()).resumed(3, 4, [], SkipWindows([(21, 23)]))
    batches = Batches(dataset, course, 2)
    wanted = {2: range(4, 8), 3: range(8, 20), 4: [20, 23, 24, 25]}
    for step, samples in wanted.items():
        assert batches.samples(step) == list(samples)
        assert (global_batch(batches, step, 2) == np.stack([dataset.sample(k) for k in samples])).all()
