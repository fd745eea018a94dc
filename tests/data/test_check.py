"""Token ids that are not in the vocabulary are found before training, for a bounded number of bytes, and once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_stable.data import (
    IndexedDataset,
    IndexedWriter,
    TokenDataset,
    Tokenizer,
    check_boundaries,
    check_share,
    check_tokenizer,
    check_vocabulary,
    open_dataset,
    remember,
    unchecked,
)
from megatron_stable.data.check import BLOCK, MOST
from megatron_stable.data.shards import ShardSet
from megatron_stable.errors import DataError


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What is read of the .bin files: prefix, first byte, bytes."""
    done: list[tuple[str, int, int]] = []
    read = IndexedDataset.read

    def counting(self: IndexedDataset, start: int, count: int) -> np.ndarray:
        done.append((self.prefix, start * self.dtype.itemsize, count * self.dtype.itemsize))
        return read(self, start, count)

    monkeypatch.setattr(IndexedDataset, "read", counting)
    return done


def large(prefix: Path, tokens: int, ids: dict[int, int] | None = None) -> IndexedDataset:
    """A dataset of zeros, but for some ids by their place."""
    with IndexedWriter(prefix, np.uint16) as writer:
        content = np.zeros(tokens, np.uint16)
        for place, token in (ids or {}).items():
            content[place] = token
        writer.add(content)
    return IndexedDataset(prefix)


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


def test_what_is_read_is_bounded_over_all_datasets_and_ranks(tmp_path: Path, reads: list) -> None:
    small, *others = [large(tmp_path / name, size) for name, size in (("s", 10_000), ("a", 10**6), ("b", 2 * 10**6))]
    most, ranks = 60 * BLOCK, 8
    per_rank = []
    for rank in range(ranks):
        reads.clear()
        check_share([small, *others], 1, rank, ranks, most)
        per_rank.append(list(reads))
    everything = [each for one in per_rank for each in one]
    assert len(set(everything)) == len(everything), "no rank reads what another reads"
    assert sum(count for prefix, _, count in everything if prefix == small.prefix) == small.tokens * 2, "whole"
    for dataset in others:
        blocks = sorted(start // (2 * BLOCK) for prefix, start, _ in everything if prefix == dataset.prefix)
        strata = [block * 20 // -(-dataset.tokens // BLOCK) for block in blocks]
        assert len(blocks) == 20 and max(abs(part - i) for i, part in enumerate(strata)) <= 1, "one from each twentieth"
    assert sum(count for *_, count in everything) <= most * 2
    assert max(sum(count for *_, count in one) for one in per_rank) <= 2 * BLOCK * 9, "3 + 3 + 1 blocks, or so"
    assert MOST * 2 == 2**25, "32 MB of uint16"


def test_the_chance_to_miss_is_as_stated(tmp_path: Path) -> None:
    """Of datasets with bad ids in one of ten blocks, 20 blocks of each are read: 0.9^20 = 12% at most are missed."""
    blocks, random, missed = 200, np.random.default_rng(0), 0
    dataset = large(tmp_path / "a", blocks * BLOCK)
    for _ in range(1000):
        bad = set(random.choice(blocks, blocks // 10, replace=False).tolist())
        chosen = np.zeros(blocks, bool)
        chosen[list(bad)] = True
        dataset.read = lambda start, count: np.array([int(chosen[start // BLOCK])])  # type: ignore[method-assign]  # noqa: B023
        try:
            check_share([dataset], 1, most=20 * BLOCK)
            missed += 1
        except DataError:
            pass
    assert 60 < missed < 150


def test_a_second_start_reads_nothing(tmp_path: Path, reads: list) -> None:
    large(tmp_path / "a", 50_000, {7: 99})
    dataset = TokenDataset(tmp_path / "a", 8, seed=1)
    check_vocabulary(dataset, 100)
    assert sum(count for *_, count in reads) == 100_000
    reads.clear()
    for vocab_size in (100, 101, 5000):
        check_vocabulary(TokenDataset(tmp_path / "a", 8, seed=1), vocab_size)
    assert reads == []
    with pytest.raises(DataError, match="token id 99 at token 7"):
        check_vocabulary(dataset, 99)
    check_vocabulary(dataset, 100)
    status = (tmp_path / "a.bin").stat()
    os.utime(tmp_path / "a.bin", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    reads.clear()
    check_vocabulary(dataset, 100)
    assert sum(count for *_, count in reads) == 100_000, "touched"


def test_what_was_noted_about_a_dataset_stays(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = large(tmp_path / "a", 100)
    (tmp_path / "a.meta.json").write_text(json.dumps({"tokenizer_sha256": tokenizer.sha256, "vocab_size": 400}))
    remember(dataset, 400)
    assert dataset.metadata is not None and dataset.metadata["tokenizer_sha256"] == tokenizer.sha256
    assert unchecked([dataset, dataset], 400) == [] and unchecked([dataset, dataset], 399) == [0], "each but once"
    check_tokenizer(TokenDataset(tmp_path / "a", 8, seed=1), tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.meta.json"]


@pytest.mark.parametrize("content", ["{", "[]", '{"checked": 3}', '{"checked": {"vocab_size": "x"}}', None])
def test_where_nothing_can_be_noted_or_read_it_is_checked_each_time(tmp_path: Path, content: str | None) -> None:
    dataset = large(tmp_path / "a", 100)
    meta = tmp_path / "a.meta.json"
    if content is None:
        meta.with_name("a.meta.json.partial").mkdir()  # as in a directory that cannot be written, for root too
    else:
        meta.write_text(content)
    assert unchecked([dataset], 10) == [0]
    check_vocabulary(TokenDataset(tmp_path / "a", 8, seed=1), 10)
    if content in ("{", "[]"):
        assert meta.read_text() == content, "what is not understood is left alone"
    assert unchecked([dataset], 10) == ([0] if content in ("{", "[]", None) else [])


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


def in_documents(prefix: Path, documents: list[list[int]]) -> TokenDataset:
    with IndexedWriter(prefix, np.uint16) as writer:
        for tokens in documents:
            writer.add(tokens)
    return TokenDataset(prefix, 2, seed=0)


@pytest.mark.parametrize(
    "documents",
    [
        [[3, 4, 1], [5, 1], [1], [6, 7, 1]],  # behind each
        [[1, 3, 4], [1, 5], [1], [1, 6, 7]],  # before each
        [[3, 4, 1], [5, 6]],  # the last one is cut off
        [[], [3, 4, 1], [], [5, 1]],  # some hold nothing, which others' tools write
    ],
)
def test_documents_with_a_token_between_them_pass(tmp_path: Path, documents: list[list[int]]) -> None:
    check_boundaries(in_documents(tmp_path / "data", documents), 1)


def test_documents_without_one_are_refused_wherever_they_are(tmp_path: Path) -> None:
    many = [[3, 4, 1]] * 1000
    check_boundaries(in_documents(tmp_path / "good", many), 1)
    with pytest.raises(DataError, match=r"good: document 0 does not end with token 2.*data\.end_of_document"):
        check_boundaries(TokenDataset(tmp_path / "good", 2, seed=0), 2)
    bad = in_documents(tmp_path / "bad", [*many, *[[3, 4]] * 100])
    with pytest.raises(DataError, match=r"document 10\d\d does not end with token 1"):
        check_boundaries(bad, 1)
    with pytest.raises(DataError, match="document 0 does not end"):
        check_boundaries(in_documents(tmp_path / "one", [[3, 4, 5, 6]]), 1)


def test_boundaries_of_shards_are_found_without_their_indices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """These are 20 GB at 10^12 tokens, and would be read at each start."""
    for i, end in enumerate((1, 1, 2)):
        in_documents(tmp_path / f"data-{i:05}-of-00003", [[3, 4, end], [5, end], [6, 7, 8, end]] * 5)
    shards = TokenDataset(tmp_path / "data", 2, seed=0)
    indexed = shards.indexed
    assert [indexed.glance(i) for i in range(45)] == [indexed.document_span(i) for i in range(45)]
    monkeypatch.setattr(ShardSet, "_index", lambda *_: pytest.fail("an index is opened"))
    with pytest.raises(DataError, match="data: document 30 does not end with token 1"):
        check_boundaries(shards, 1)


def test_few_documents_are_looked_at_for_boundaries(tmp_path: Path, reads: list[tuple[str, int, int]]) -> None:
    dataset = in_documents(tmp_path / "data", [[3, 1]] * 5000)
    reads.clear()
    check_boundaries(dataset, 1)
    assert 0 < len(reads) <= 65 and sum(size for _, _, size in reads) < 1000
