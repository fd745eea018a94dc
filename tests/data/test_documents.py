"""Documents come out of every kind of file, in order; what is none is named with its place."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_stable.data import DocumentReader, UndecodableError
from megatron_stable.errors import DataError

TEXTS = ["first\n", "", "zweites «Ü» 😀", "with\0nul", "last"]


def read(*inputs: Path, key: str = "text") -> list[str]:
    return [document.text(key) for document in DocumentReader(inputs, key)]


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)).encode()


def zst(data: bytes) -> bytes:
    """Two frames."""
    half = len(data) // 2
    return zstandard.compress(data[:half]) + zstandard.compress(data[half:])


def test_plain_files_are_one_document_each(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"x = 1\r\n\ty\n")
    (tmp_path / "b").write_bytes(b"\xef\xbb\xbfwith a BOM")
    (tmp_path / "c.md.gz").write_bytes(gzip.compress(b"# packed\n"))
    (tmp_path / "d.txt.zst").write_bytes(zst(b"frame by frame"))
    files = sorted(tmp_path.iterdir())
    assert read(*files) == ["x = 1\r\n\ty\n", "with a BOM", "# packed\n", "frame by frame"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zst], ids=["plain", "gz", "zst"])
def test_json_lines(tmp_path: Path, pack) -> None:
    path = tmp_path / {"bytes": "a.jsonl", "compress": "a.jsonl.gz", "zst": "a.jsonl.zst"}[pack.__name__]
    path.write_bytes(pack(b"\xef\xbb\xbf" + jsonl(TEXTS, "body") + b"\n  \n"))
    assert read(path, key="body") == TEXTS


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(TEXTS, pa.string()).cast(kind)
    pq.write_table(pa.table({"n": list(range(5)), "text": column}), tmp_path / "a.parquet", row_group_size=2)
    assert read(tmp_path / "a.parquet") == TEXTS


def test_parquet_null_is_an_empty_document(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["a", ""]


def test_directory_is_walked_in_sorted_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "a/z.txt", "c.txt", ".git/config", "b/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["c.txt", "a/z.txt", "b/1.txt", "b/2.txt"]


def test_progress_reaches_the_total(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x" * 1000] * 500))
    (tmp_path / "b.txt").write_text("text")
    reader = DocumentReader([tmp_path])
    seen = [reader.bytes_read for _ in reader]
    assert seen == sorted(seen)
    assert 0 < seen[0] < seen[400] <= reader.total_bytes == reader.bytes_read


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9!", r"a\.txt: not UTF-8 at byte 3; .*--skip-undecodable"),
        ("a.txt", "text".encode("utf-16"), r"a\.txt: not UTF-8 at byte 0"),
        ("a.bin", b"\x7fELF\0\0", r"a\.bin: binary, not text \(NUL at byte 4\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8 at byte 24"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"a\.jsonl, line 2: not JSON .*begins at byte 14"),
        ("a.jsonl", b'["text"]\n', "line 1: a JSON list, not an object"),
        ("a.jsonl", b'{"text": null}\n', "line 1: 'text' is null, not a string"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: lone surrogate"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "line 1: not JSON"),
    ],
)
def test_undecodable_documents(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UndecodableError, match=message):
        read(tmp_path / name)


def test_undecodable_parquet_row(tmp_path: Path) -> None:
    column = pa.array([b"a", b"\xff"]).view(pa.string()) if hasattr(pa.Array, "view") else None
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UndecodableError, match="row 2: not UTF-8 at byte 0"):
        read(tmp_path / "a.parquet")


def test_wrong_text_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a"], "content"))
    pq.write_table(pa.table({"contents": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match="line 1: no key 'text'; choose the text key with --text-key, there is: id, con"
    ):
        read(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="no key 'contnt'; did you mean 'content'"):
        read(tmp_path / "a.jsonl", key="contnt")
    with pytest.raises(DataError, match="no column 'text'"):
        read(tmp_path / "a.parquet")


def test_parquet_column_that_is_no_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'text' is int64, not text"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("cut", [1, 20])
@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("zst", zst)])
def test_truncated_compressed_file(tmp_path: Path, ending: str, pack, cut: int) -> None:
    data = pack(os.urandom(3000).hex().encode())
    (tmp_path / f"a.txt.{ending}").write_bytes(data[:-cut])
    with pytest.raises(DataError, match=r"a\.txt.*broken compressed file"):
        read(tmp_path / f"a.txt.{ending}")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.parquet"])
def test_file_that_is_not_what_its_name_says(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"this is plain text, nothing else")
    with pytest.raises(DataError, match=f"{name}: broken"):
        read(tmp_path / name)


def test_missing_and_empty_inputs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*nowhere: No such file"):
        DocumentReader([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="no files in the directory"):
        DocumentReader([tmp_path])
    with pytest.raises(DataError, match="no input given"):
        DocumentReader([])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a file nor a directory"):
        DocumentReader([tmp_path / "pipe"])


def test_dangling_link_in_a_directory(tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(DataError, match=r"cannot read .*link\.txt"):
        DocumentReader([tmp_path])
