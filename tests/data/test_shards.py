"""Shards are one stream of tokens, opened with few files; what is missing or foreign is named."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks.data_counts import write_sparse
from megatron_stable.data import (
    IndexedDataset,
    TokenDataset,
    Tokenizer,
    check_tokenizer,
    check_vocabulary,
    open_dataset,
)
from megatron_stable.data import shards as module
from megatron_stable.data.shards import ShardSet, open_tokens, shard_prefix
from megatron_stable.errors import DataError, MegatronStableError

DOCUMENTS = [[list(range(100 * i, 100 * i + n))] for i, n in enumerate([7, 1, 30, 12, 5, 9, 40, 3, 3, 21])]
CUTS = [0, 2, 2, 3, 7, 9, 10]  # the second shard is empty


@pytest.fixture
def whole(write_dataset: Callable[..., Path]) -> Path:
    return write_dataset("whole", DOCUMENTS, code=4, letter="i")


@pytest.fixture
def prefix(write_dataset: Callable[..., Path], tmp_path: Path) -> Path:
    """The same documents in shards."""
    for i, (first, end) in enumerate(pairwise(CUTS)):
        write_dataset(shard_prefix("corpus", i, len(CUTS) - 1), DOCUMENTS[first:end], code=4, letter="i")
    return tmp_path / "corpus"


def test_shards_are_the_same_stream_as_one_file(whole: Path, prefix: Path) -> None:
    one, many = IndexedDataset(whole), open_tokens(prefix)
    assert isinstance(many, ShardSet)
    assert (many.tokens, many.documents, many.dtype) == (one.tokens, one.documents, one.dtype)
    for start in range(one.tokens):
        assert many.document_at(start) == one.document_at(start)
        for count in (0, 1, 3, 11, one.tokens - start):
            count = min(count, one.tokens - start)
            assert np.array_equal(many.read(start, count), one.read(start, count))
            many.will_need(start, count)
    spans = [many.document_span(i) for i in range(many.documents)]
    assert spans == [one.document_span(i) for i in range(one.documents)]


def test_samples_are_the_same_as_of_one_file(whole: Path, prefix: Path) -> None:
    one, many = TokenDataset(whole, 8, seed=3), TokenDataset(prefix, 8, seed=3)
    assert all(np.array_equal(one.sample(k), many.sample(k)) for k in range(3 * one.windows))


@pytest.mark.parametrize("start, count", [(-1, 1), (0, 132), (131, 1), (5, -1)])
def test_reading_beyond_the_stream(prefix: Path, start: int, count: int) -> None:
    with pytest.raises(IndexError):
        open_tokens(prefix).read(start, count)
    for call in (open_tokens(prefix).document_at, open_tokens(prefix).document_span):
        with pytest.raises(IndexError):
            call(1000)


def test_lists_and_globs_and_blends(whole: Path, prefix: Path, stream: Callable[..., Path]) -> None:
    other, tokens = str(stream(20)), IndexedDataset(whole).read(0, 131)
    several = open_tokens([other, str(prefix), str(whole)])
    assert several.read(0, several.tokens).tolist() == [*range(20), *tokens, *tokens]
    found = open_tokens(f"{prefix.parent}/corp*")
    assert found.read(0, found.tokens).tolist() == tokens.tolist()
    assert isinstance(open_tokens([other]), IndexedDataset)
    mixed = open_dataset({str(prefix): 1.0, other: 1.0}, 8, seed=0)
    assert [part.indexed.tokens for part in mixed.parts] == [131, 20]


def test_a_prefix_may_look_like_a_glob(stream: Callable[..., Path]) -> None:
    assert open_tokens(stream(20, "a[1]")).tokens == 20


def test_few_files_are_open_and_none_before_it_is_read(
    stream: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OPEN", 10)
    for i in range(200):
        stream(40, shard_prefix("many", i, 200))
    process = psutil.Process()
    gc.collect()
    before = process.num_fds()
    many = open_tokens(tmp_path / "many")
    assert process.num_fds() == before
    assert np.array_equal(many.read(0, many.tokens), np.tile(np.arange(40), 200))
    assert process.num_fds() <= before + 10
    assert [many.document_at(40 * i + 39) for i in range(200)] == [4 * i + 3 for i in range(200)]
    assert before < process.num_fds() <= before + 10 + 2 * module.INDEXED
    del many
    gc.collect()
    assert process.num_fds() == before


def test_all_sources_of_a_blend_together_have_few_files_open(
    stream: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`doctor` counts on it, and so does a run of many sources."""
    monkeypatch.setattr(module, "OPEN", 10)
    for name in "abcdef":
        for i in range(8):
            stream(40, shard_prefix(name, i, 8))
    process = psutil.Process()
    gc.collect()
    before = process.num_fds()
    mixed = open_dataset({str(tmp_path / name): 1.0 for name in "abcdef"}, 8, seed=0)
    alone = {name: TokenDataset(tmp_path / name, 8, seed=0) for name in "abcdef"}
    for k in range(6 * 39):
        where = mixed.locate(k)
        own = mixed.stages.locate(k)[1]  # type: ignore[union-attr]
        assert np.array_equal(mixed.sample(k), alone[Path(where.dataset.indexed.prefix).name].sample(own))
    assert process.num_fds() <= before + 10
    for dataset in (*mixed.parts, *alone.values()):
        assert dataset.indexed.document_at(dataset.indexed.tokens - 1) == dataset.indexed.documents - 1
    assert process.num_fds() <= before + 10 + 2 * module.INDEXED
    del mixed, alone, dataset, where
    gc.collect()
    assert process.num_fds() == before


def test_a_trillion_tokens(tmp_path: Path) -> None:
    for i in range(500):
        write_sparse(tmp_path / shard_prefix("huge", i, 500), 2_000_000, 1000)
    process = psutil.Process()
    gc.collect()
    files, memory = process.num_fds(), process.memory_info().rss
    huge = TokenDataset(tmp_path / "huge", 4096, seed=1)
    assert huge.indexed.tokens == 10**12
    for k in range(0, 10**8, 10**5):
        assert huge.sample(k).shape == (4097,)
    assert process.num_fds() - files <= module.OPEN
    assert process.memory_info().rss - memory < 100e6


def test_the_check_of_the_vocabulary_is_noted_once_for_all(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_vocabulary(TokenDataset(prefix, 8, 0), 1000)
    assert json.loads(Path(f"{prefix}.meta.json").read_text())["checked"]["shards"] == 5
    again = TokenDataset(prefix, 8, 0)
    monkeypatch.setattr(again.indexed, "read", lambda *_: pytest.fail("read again"))
    check_vocabulary(again, 1000)
    with pytest.raises(DataError, match=r"token id 600 at token 64 \(document 6\)"):
        check_vocabulary(TokenDataset(prefix, 8, 0), 600)
    os.utime(f"{shard_prefix(prefix, 2, 6)}.bin", (10**10, 10**10))
    with pytest.raises(DataError, match="token id 900 at"):
        check_vocabulary(TokenDataset(prefix, 8, 0), 900)


# Bad input


def test_a_shard_that_is_cut_while_it_is_read(prefix: Path) -> None:
    many = open_tokens(prefix)
    os.truncate(f"{shard_prefix(prefix, 3, 6)}.bin", 8)
    with pytest.raises(DataError, match=r"corpus-00003-of-00006\.bin ends before token"):
        many.read(0, many.tokens)


def refused(source: object, message: str) -> None:
    with pytest.raises(MegatronStableError, match=message) as caught:
        open_tokens(source)  # type: ignore[arg-type]
    assert caught.value.exit_code == 5


def test_missing_shards(prefix: Path) -> None:
    for shard in (1, 4):
        for kind in ("idx", "bin"):
            Path(f"{shard_prefix(prefix, shard, 6)}.{kind}").unlink()
    missing = "lacks 2 of 6 shards: .*corpus-00001-of-00006, .*corpus-00004-of-00006; run the same preprocess"
    refused(prefix, missing)
    refused(str(prefix), missing)
    refused([str(prefix)], missing)
    refused(f"{prefix}*", missing)


def test_a_shard_without_tokens_file(prefix: Path) -> None:
    Path(f"{shard_prefix(prefix, 3, 6)}.bin").unlink()
    refused(prefix, r"corpus-00003-of-00006\.bin does not exist")


def test_a_truncated_shard_is_found_on_opening(prefix: Path) -> None:
    path = Path(f"{shard_prefix(prefix, 3, 6)}.bin")
    path.write_bytes(path.read_bytes()[:-4])
    refused(prefix, r"corpus-00003-of-00006\.bin is truncated")


def test_a_broken_index_is_found_on_opening(prefix: Path) -> None:
    path = Path(f"{shard_prefix(prefix, 3, 6)}.idx")
    for content, message in ((path.read_bytes()[:-1], "is truncated"), (b"no index", "is not a Megatron index")):
        path.write_bytes(content)
        refused(prefix, f"corpus-00003-of-00006.idx {message}")


def test_two_numbers_of_shards(prefix: Path, stream: Callable[..., Path]) -> None:
    stream(10, shard_prefix("corpus", 0, 2))
    refused(prefix, "is there in 2 and in 6 shards")


def test_nothing_there(tmp_path: Path, write_dataset: Callable[..., Path]) -> None:
    refused(tmp_path / "corpus", r"no dataset .*corpus.idx does not exist")
    refused(str(tmp_path / "corp*"), "no file is called")
    write_dataset(shard_prefix("empty", 0, 1), [])
    refused(tmp_path / "empty", "holds no tokens in any of its 1 shards")


def test_mixed_types(prefix: Path, write_dataset: Callable[..., Path]) -> None:
    write_dataset(shard_prefix("corpus", 3, 6), DOCUMENTS[3:7])
    refused(prefix, "corpus-00003-of-00006 has tokens of type uint16")


def test_tokenizers(prefix: Path, tokenizer: Tokenizer) -> None:
    dataset = TokenDataset(prefix, 8, 0)
    check_tokenizer(dataset, tokenizer)
    Path(f"{shard_prefix(prefix, 2, 6)}.meta.json").write_text(json.dumps({"tokenizer_sha256": "a", "vocab_size": 9}))
    with pytest.raises(DataError, match=r"corpus was made with another tokenizer \(vocabulary 9\)"):
        check_tokenizer(TokenDataset(prefix, 8, 0), tokenizer)
    Path(f"{shard_prefix(prefix, 3, 6)}.meta.json").write_text(json.dumps({"tokenizer_sha256": "b"}))
    with pytest.raises(DataError, match=r"corpus-00002-of-00006 and .*corpus-00003-of-00006 were made with different"):
        check_tokenizer(TokenDataset(prefix, 8, 0), tokenizer)
