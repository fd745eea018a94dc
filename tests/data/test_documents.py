"""Documents come out of every kind of file, in order; what is none is named with its place."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


# Arrow and tar


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream], ids=["file", "stream"])
def test_arrow(tmp_path: Path, new) -> None:
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, new(file, pa.schema({"n": "int64", "text": "str"})) as out:
        for i, text in enumerate(TEXTS):
            out.write_batch(pa.record_batch({"n": [i, i], "text": [text, None]}))
    assert read(tmp_path / "a.arrow") == [each for text in TEXTS for each in (text, "")]
    with pytest.raises(DataError, match="no column 'txt'; did you mean 'text'"):
        read(tmp_path / "a.arrow", key="txt")
    with pytest.raises(DataError, match="column 'n' is int64, not text"):
        read(tmp_path / "a.arrow", key="n")


def tar(path: Path, members: list[tuple[str, bytes]], pack=bytes) -> Path:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    path.write_bytes(pack(packed.getvalue()))
    return path


SAMPLES = [
    ("a/0001.jpg", b"\xff\xd8"),
    ("a/0001.txt", b"first"),
    ("a/0001.json", b'{"text": "of the image"}'),
    ("a/0002.json", '{"text": "zweites «Ü»", "n": 1}'.encode()),
    ("a/0003.cls", b"7"),
    ("b/0003.txt", b"last\n"),
]


@pytest.mark.parametrize(
    "ending, pack", [("tar", bytes), ("tar.gz", gzip.compress), ("tgz", gzip.compress), ("tar.zst", zst)]
)
def test_webdataset(tmp_path: Path, ending: str, pack) -> None:
    path = tar(tmp_path / f"a.{ending}", SAMPLES, pack)
    assert read(path) == ["first", "zweites «Ü»", "last\n"]
    assert [document.record for document in DocumentReader([path])] == ["a/0001.txt", "a/0002.json", "b/0003.txt"]


def test_tar_that_is_unusable(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no text: its samples have neither a \.txt nor a \.json"):
        read(tar(tmp_path / "a.tar", SAMPLES[:1]))
    whole = tar(tmp_path / "b.tar", [("1.txt", b"x" * 5000)])
    whole.write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(DataError, match="broken tar archive"):
        read(whole)
    whole.write_bytes(b"no archive" * 100)
    with pytest.raises(DataError, match="broken tar archive"):
        read(whole)
    with pytest.raises(UndecodableError, match=r"c\.tar, 1\.txt: not UTF-8 at byte 3"):
        read(tar(tmp_path / "c.tar", [("1.txt", b"caf\xe9")]))


def test_broken_arrow(tmp_path: Path) -> None:
    (tmp_path / "a.arrow").write_bytes(b"no arrow" * 10)
    with pytest.raises(DataError, match="broken Arrow file"):
        read(tmp_path / "a.arrow")


# Shares


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text("ab\n«", max_size=12), max_size=30), shares=st.integers(1, 9), group=st.integers(1, 7))
def test_shares_in_order_are_the_whole(tmp_path: Path, texts: list[str], shares: int, group: int) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    (folder / "a.jsonl").write_bytes(b"\n" + jsonl(texts).replace(b"}\n", b"}\r\n\n"))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(texts)))
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), folder / "c.parquet", row_group_size=group)
    for i, text in enumerate(texts):
        (folder / f"d{i:02}").write_text(text)
    (folder / "e.jsonl").write_bytes(jsonl(texts)[:-1])
    whole = [document.text() for document in DocumentReader([folder])]
    readers = [DocumentReader([folder], share=i, shares=shares) for i in range(shares)]
    assert [document.text() for reader in readers for document in reader] == whole
    assert all(reader.bytes_read == reader.total_bytes for reader in readers)
    assert sum(reader.total_bytes for reader in readers) == DocumentReader([folder]).total_bytes


def test_shares_of_divisible_files_are_even(tmp_path: Path) -> None:
    texts = ["x" * 100] * 1000
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    pq.write_table(
        pa.table({"text": texts}), tmp_path / "b.parquet", row_group_size=30, compression=None, use_dictionary=False
    )
    counts = [len(list(DocumentReader([tmp_path], share=i, shares=10))) for i in range(10)]
    assert sum(counts) == 2000 and max(counts) - min(counts) <= 20


def test_a_line_of_a_later_share_is_named_by_its_byte(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' * 10 + b"broken\n")
    with pytest.raises(UndecodableError, match=r"a\.jsonl, byte 140: not JSON"):
        [document.text() for document in DocumentReader([tmp_path], share=1, shares=2)]


def test_a_line_that_begins_where_a_share_ends_is_in_the_next(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(b'{"text": "%d"}\n' % i for i in range(8)))
    readers = [DocumentReader([tmp_path], share=i, shares=4) for i in range(4)]
    found = [[document.text() for document in reader] for reader in readers]
    assert found == [["0", "1"], ["2", "3"], ["4", "5"], ["6", "7"]]
