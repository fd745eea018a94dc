"""Samples cover the stream once per epoch; blends keep their proportions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

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


def test_blend_reads_its_parts(stream: Callable[..., Path]) -> None:
    a, b = stream(41, "a"), stream(81, "b")
    mixed = open_dataset({str(a): 1, str(b): 3}, 4, seed=2)
    alone = [TokenDataset(a, 4, seed=2), TokenDataset(b, 4, seed=2)]
    assert isinstance(mixed, Blend)
    for k in range(200):
        name, own = mixed.stages.locate(k)
        assert (mixed.sample(k) == alone[name == str(b)].sample(own)).all()
        assert mixed.locate(k).dataset is mixed.datasets[name]
    assert isinstance(open_dataset(str(a), 4, seed=2), TokenDataset)


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_unusable_weights(stream: Callable[..., Path], weight: float) -> None:
    with pytest.raises(ConfigError, match=r"weight .* in the blend: it must be a number above 0"):
        open_dataset({str(stream(41)): weight}, 4, seed=2)


def test_empty_blend() -> None:
    with pytest.raises(ConfigError, match="a blend needs datasets"):
        open_dataset({}, 4, seed=2)
