"""Megatron's format, byte for byte, against parsers and writers that share no code with ours."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_stable.data import IndexedDataset, IndexedWriter, TokenDataset, token_dtype
from megatron_stable.errors import DataError

DOCUMENTS = [[1, 2, 3], [65000], [7, 8, 9, 10, 11], [12, 13]]


def parse(prefix: Path, letter: str) -> tuple[int, list[list[int]]]:
    """Dtype code and documents, with struct alone."""
    index, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\0\0"
    version, code, sequences, bounds = struct.unpack("<QBQQ", index[9:34])
    assert version == 1
    lengths = struct.unpack(f"<{sequences}i", index[34 : 34 + 4 * sequences])
    pointers = struct.unpack(f"<{sequences}q", index[34 + 4 * sequences : 34 + 12 * sequences])
    firsts = struct.unpack(f"<{bounds}q", index[34 + 12 * sequences :])
    read = [list(struct.unpack_from(f"<{n}{letter}", data, p)) for n, p in zip(lengths, pointers, strict=True)]
    return code, [[*chain(*read[a:b])] for a, b in pairwise(firsts)]


def write(prefix: Path, documents: list[list[int]], dtype: object = np.uint16) -> None:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(document)


@pytest.mark.parametrize(("dtype", "code", "letter"), [(np.uint16, 8, "H"), (np.int32, 4, "i"), (np.int64, 5, "q")])
def test_what_is_written_reads_back_independently(tmp_path: Path, dtype: object, code: int, letter: str) -> None:
    write(tmp_path / "a", DOCUMENTS, dtype)
    assert parse(tmp_path / "a", letter) == (code, DOCUMENTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.parametrize(("code", "letter"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")])
def test_what_others_write_is_read(write_dataset: Callable[..., Path], code: int, letter: str) -> None:
    prefix = write_dataset("a", [[[1, 2, 3], [4]], [[5, 6]], [], [[], [7], []]], code, letter)
    dataset = IndexedDataset(prefix)
    assert (dataset.tokens, dataset.documents, dataset.metadata) == (7, 4, None)
    assert dataset.read(0, 7).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert dataset.read(2, 3).tolist() == [3, 4, 5]
    assert [dataset.document_at(token) for token in range(7)] == [0, 0, 0, 0, 1, 1, 3]
    assert [dataset.document_span(document) for document in range(4)] == [(0, 4), (4, 6), (6, 6), (6, 7)]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(0, 65535), max_size=20), min_size=1, max_size=20).filter(any))
def test_any_documents_round_trip(tmp_path: Path, documents: list[list[int]]) -> None:
    write(tmp_path / "a", documents)
    assert parse(tmp_path / "a", "H")[1] == documents
    dataset = IndexedDataset(tmp_path / "a")
    assert dataset.read(0, dataset.tokens).tolist() == [*chain(*documents)]
    owners = [number for number, document in enumerate(documents) for _ in document]
    assert [dataset.document_at(token) for token in range(dataset.tokens)] == owners
    assert [dataset.read(a, b - a).tolist() for a, b in map(dataset.document_span, range(len(documents)))] == documents


def test_many_documents_at_once(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.int32) as writer:
        writer.add([1, 2, 3, 4, 5, 6], [2, 0, 4])
        assert (writer.documents, writer.tokens) == (3, 6)
    assert parse(tmp_path / "a", "i")[1] == [[1, 2], [], [3, 4, 5, 6]]


def test_reads_are_views_that_cannot_be_written(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    tokens = IndexedDataset(tmp_path / "a").read(0, 4)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_out_of_range(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    dataset = IndexedDataset(tmp_path / "a")
    for start, count in ((-1, 2), (10, 2), (12, 0), (0, -1)):
        with pytest.raises(IndexError):
            dataset.read(start, count)
    for token in (-1, 11):
        with pytest.raises(IndexError):
            dataset.document_at(token)
    with pytest.raises(IndexError):
        dataset.document_span(4)


def test_dtype_rule_is_megatrons() -> None:
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32


# Bad input


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no dataset .*/a: .*a\.idx does not exist"):
        IndexedDataset(tmp_path / "a")
    write(tmp_path / "a", DOCUMENTS)
    with pytest.raises(DataError, match=r"give the prefix without \.bin or \.idx"):
        IndexedDataset(tmp_path / "a.bin")
    (tmp_path / "a.bin").unlink()
    with pytest.raises(DataError, match=r"a\.bin does not exist"):
        IndexedDataset(tmp_path / "a")


@pytest.mark.parametrize("cut", range(1, 34 + 12 * 4 + 8 * 5 + 1))
def test_truncated_idx(tmp_path: Path, cut: int) -> None:
    write(tmp_path / "a", DOCUMENTS)
    data = (tmp_path / "a.idx").read_bytes()
    (tmp_path / "a.idx").write_bytes(data[:-cut])
    with pytest.raises(DataError, match=r"a\.idx is (truncated|empty)"):
        IndexedDataset(tmp_path / "a")


@pytest.mark.parametrize("cut", [1, 2, 21, 22])
def test_truncated_bin(tmp_path: Path, cut: int) -> None:
    write(tmp_path / "a", DOCUMENTS)
    data = (tmp_path / "a.bin").read_bytes()
    assert len(data) == 22
    (tmp_path / "a.bin").write_bytes(data[:-cut])
    with pytest.raises(DataError, match=rf"a\.bin is truncated: {22 - cut} bytes, .*a\.idx says 22"):
        IndexedDataset(tmp_path / "a")


def test_bin_of_another_dataset(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    (tmp_path / "a.bin").write_bytes(bytes(100))
    with pytest.raises(DataError, match=r"a\.bin is too long: 100 bytes"):
        IndexedDataset(tmp_path / "a")


@pytest.mark.parametrize("documents", [[], [[]], [[], []]])
def test_no_tokens(tmp_path: Path, documents: list[list[int]]) -> None:
    write(tmp_path / "a", documents)
    with pytest.raises(DataError, match=r"a\.bin holds no tokens"):
        IndexedDataset(tmp_path / "a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1 something else entirely, long enough for a header", "is not a Megatron index: it begins with b'PAR1"),
        (b"TNTIDX\0\0" + bytes(40), "fairseq's old format"),
        (b"x", "is not a Megatron index"),
    ],
)
def test_foreign_idx(tmp_path: Path, content: bytes, message: str) -> None:
    write(tmp_path / "a", DOCUMENTS)
    (tmp_path / "a.idx").write_bytes(content)
    with pytest.raises(DataError, match=message):
        IndexedDataset(tmp_path / "a")


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (9, struct.pack("<Q", 2), "version 2; this reads version 1"),
        (17, b"\x06", "dtype code 6, which is no integer"),
        (17, b"\x63", "dtype code 99"),
        (17, b"\x04", r"a\.bin is truncated"),
        (18, struct.pack("<Q", 2**62), "is truncated"),
        (18, struct.pack("<Q", 3), "is corrupt: 122 bytes"),
        (26, struct.pack("<Q", 0), "is corrupt"),
        (34, struct.pack("<i", -3), "do not follow each other"),
        (38, struct.pack("<i", 2), "do not follow each other"),
        (50, struct.pack("<q", 2), "do not follow each other"),
        (58, struct.pack("<q", -6), "do not follow each other"),
        (82, struct.pack("<q", 1), "documents do not cover its 4 sequences"),
        (114, struct.pack("<q", 5), "documents do not cover its 4 sequences"),
        (90, struct.pack("<q", 3), "are out of order"),
    ],
)
def test_corrupt_idx(tmp_path: Path, offset: int, value: bytes, message: str) -> None:
    write(tmp_path / "a", DOCUMENTS)
    data = bytearray((tmp_path / "a.idx").read_bytes())
    data[offset : offset + len(value)] = value
    (tmp_path / "a.idx").write_bytes(data)
    with pytest.raises(DataError, match=message):
        IndexedDataset(tmp_path / "a")


def test_negative_length_that_adds_up(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    data = bytearray((tmp_path / "a.idx").read_bytes())
    struct.pack_into("<ii", data, 34, -1, 5)
    struct.pack_into("<q", data, 34 + 4 * 4 + 8, -2)
    (tmp_path / "a.idx").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.idx is corrupt: sequences 0 \.\. 3 do not follow each other"):
        IndexedDataset(tmp_path / "a")


# Writing


def test_interrupted_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add([1, 2, 3])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_interrupted_writing_keeps_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add([1, 2, 3])
        raise RuntimeError
    assert parse(tmp_path / "a", "H")[1] == DOCUMENTS
    assert len(list(tmp_path.iterdir())) == 2


def test_writing_replaces_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a.meta.json").write_text('{"tokenizer_sha256": "of the old data"}')
    for name in ("a.bin.1f.partial", "a.idx.1f.partial", "a.meta.json.1f.partial"):
        (tmp_path / name).write_text("left by a killed process")
    write(tmp_path / "a", [[1]])
    write(tmp_path / "a", DOCUMENTS)
    assert parse(tmp_path / "a", "H")[1] == DOCUMENTS
    assert IndexedDataset(tmp_path / "a").metadata is None
    assert len(list(tmp_path.iterdir())) == 2


def test_writers_of_the_same_prefix_do_not_touch_each_others_files(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.uint16) as first:
        first.add([1, 2, 3])
        write(tmp_path / "a", [[4]])
        assert parse(tmp_path / "a", "H")[1] == [[4]]
    assert parse(tmp_path / "a", "H")[1] == [[1, 2, 3]]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_writer_whose_files_are_gone_leaves_what_is_there(tmp_path: Path) -> None:
    """As where a file system's locks are not seen by other machines."""
    with (
        pytest.raises(DataError, match=r"cannot write .*a\.idx: No such file"),
        IndexedWriter(tmp_path / "a", np.uint16, same=True) as writer,
    ):
        writer.add([1, 2, 3])
        writer.close()
        for path in tmp_path.glob("*.partial"):
            path.unlink()
        with IndexedWriter(tmp_path / "a", np.uint16, same=True) as other:
            other.add([1, 2, 3])
    assert parse(tmp_path / "a", "H")[1] == [[1, 2, 3]]


def test_tokens_that_do_not_fit(tmp_path: Path) -> None:
    for tokens in ([65536], [-1]):
        with (
            pytest.raises(DataError, match="do not fit the dtype uint16"),
            IndexedWriter(tmp_path / "a", np.uint16) as writer,
        ):
            writer.add(tokens)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*a\.bin: (Not a directory|File exists)"):
        IndexedWriter(tmp_path / "file" / "a", np.uint16)


def test_broken_metadata(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    for content in ("{", "[1]"):
        (tmp_path / "a.meta.json").write_text(content)
        with pytest.raises(DataError, match=r"a\.meta\.json is"):
            _ = IndexedDataset(tmp_path / "a").metadata


# Size


def test_trillion_tokens_in_a_sparse_file(tmp_path: Path) -> None:
    """10^12 tokens open, and give samples, without reading or allocating anything of that size."""
    tokens, length = 10**12, 2 * 10**9
    sequences = tokens // length
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, sequences, sequences + 1)
    index += np.full(sequences, length, "<i4").tobytes()
    index += (np.arange(sequences, dtype="<i8") * 2 * length).tobytes() + np.arange(
        sequences + 1, dtype="<i8"
    ).tobytes()
    (tmp_path / "big.idx").write_bytes(index)
    with (tmp_path / "big.bin").open("wb") as file:
        try:
            file.truncate(2 * tokens)
        except OSError as error:
            pytest.skip(f"this file system has no sparse files of 2 TB: {error}")
        marked = 123_456_789_012
        file.seek(2 * marked)
        file.write(struct.pack("<H", 4711))
    tracemalloc.start()
    dataset = TokenDataset(tmp_path / "big", 4096, seed=1)
    starts = [dataset.locate(k).start for k in (0, 1, 10**6, 10**8, 10**12)]
    samples = [dataset.sample(k) for k in (0, 10**12)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert dataset.windows == (tokens - 1) // 4096
    assert len(set(starts)) == 5
    assert all(sample.shape == (4097,) and not sample.any() for sample in samples)
    assert dataset.indexed.read(marked - 1, 3).tolist() == [0, 4711, 0]
    assert dataset.indexed.document_at(marked) == marked // length
    assert peak < 1_000_000
