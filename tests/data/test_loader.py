"""Which samples each rank gets, whatever the layout; and that token ids are checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_stable.data import (
    Batches,
    SkipWindows,
    TokenDataset,
    Tokenizer,
    check_tokenizer,
    check_vocabulary,
    open_dataset,
)
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
        batches = Batches(dataset, 12, micro)
        micros = list(batches.micro_batches(step, 0, ranks))
        assert len(micros) == 12 // (micro * ranks)
        assert all(batch.shape == (micro, 9) and batch.dtype == np.int64 for batch in micros)
        assert (global_batch(batches, step, ranks) == expected).all()


def test_skip_windows_shift_the_data(dataset: TokenDataset) -> None:
    plain, skipping = Batches(dataset, 4, 2), Batches(dataset, 4, 2, SkipWindows([(3, 5)]))
    for step, data_step in ((1, 1), (2, 2), (3, 6), (4, 7)):
        assert (global_batch(skipping, step, 1) == global_batch(plain, data_step, 1)).all()
        assert skipping.samples(step) == range((data_step - 1) * 4, data_step * 4)


def test_indivisible_batch(dataset: TokenDataset) -> None:
    with pytest.raises(ConfigError, match=r"batch.global_size 12 is not divisible by batch.micro_size 2 x 4 data-par"):
        Batches(dataset, 12, 2).micro_batches(1, 0, 4)


def test_ids_out_of_range_are_found_with_their_place(stream: Callable[..., Path]) -> None:
    dataset = open_dataset({str(stream(1001)): 1.0}, 8, seed=7)
    check_vocabulary(dataset, 1001)
    with pytest.raises(
        DataError, match=r"token id 1000 at token 1000 \(document 100\) .* tokenizer and data do not mat"
    ):
        check_vocabulary(dataset, 1000)
    with pytest.raises(DataError, match=r"token id 77 at token 77 \(document 7\) is not in the vocabulary 0 \.\. 76"):
        check_vocabulary(dataset, 77)


def test_negative_ids_are_found(write_dataset: Callable[..., Path]) -> None:
    prefix = write_dataset("a", [[[1, 2, 3]], [[4, -5, 6]]], code=4, letter="i")
    with pytest.raises(DataError, match=r"token id -5 at token 4 \(document 1\)"):
        check_vocabulary(TokenDataset(prefix, 2, seed=1), 100)


def test_large_datasets_are_sampled(stream: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_stable.data.check.BLOCK", 10)
    dataset = TokenDataset(stream(1001), 8, seed=7)
    check_vocabulary(dataset, 1001, max_tokens=50)
    with pytest.raises(DataError, match="token id 1000 at token 1000"):
        check_vocabulary(dataset, 1000, max_tokens=50)  # the last block is always read
    read = []
    monkeypatch.setattr(dataset.indexed, "read", lambda start, count: read.append(start) or np.zeros(count))
    check_vocabulary(dataset, 10, max_tokens=50)
    assert read == [0, 250, 500, 750, 1000]


def test_every_batch_is_checked(dataset: TokenDataset) -> None:
    for batch in Batches(dataset, 4, 2, vocab_size=1001).micro_batches(1):
        assert batch.max() < 1001
    bad = Batches(dataset, 125, 125, vocab_size=500)
    with pytest.raises(DataError, match="tokenizer and data do not match"):
        list(bad.micro_batches(1))


def test_tokenizer_of_another_dataset(stream: Callable[..., Path], tokenizer: Tokenizer) -> None:
    prefix = stream(1001)
    dataset = TokenDataset(prefix, 8, seed=7)
    check_tokenizer(dataset, tokenizer)  # of other origin: nothing is known
    meta = Path(f"{prefix}.meta.json")
    meta.write_text(json.dumps({"tokenizer_sha256": tokenizer.sha256, "vocab_size": 400}))
    check_tokenizer(dataset, tokenizer)
    meta.write_text(json.dumps({"tokenizer_sha256": "0" * 64, "vocab_size": 555}))
    with pytest.raises(DataError, match=r"made with another tokenizer \(vocabulary 555\) than .*tok\.model"):
        check_tokenizer(dataset, tokenizer)
