"""Documents out of files: plain text, JSON lines, Parquet, Arrow and tar archives, also compressed, in a fixed order.

What is read here are raw bytes with their place in the input; decoding is a method of the document, so that worker
processes can do it. A directory stands for the files below it in sorted order, hidden ones left out.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_stable.data import tables
from megatron_stable.data.archives import read_archive
from megatron_stable.errors import DataError
from megatron_stable.files import explain_os_errors

JSON_LINES = (".jsonl", ".ndjson")
TAR = (".tar",)


class UndecodableError(DataError):
    """A document that is not text: not UTF-8, binary, or a line that is no JSON object with a string under the key."""

    def __str__(self) -> str:
        return f"{self.reason}; convert or remove it, or skip such documents with --skip-undecodable"

    @property
    def reason(self) -> str:
        """Which document, and why, without the remedy."""
        return str(self.args[0])


@dataclass(frozen=True)
class RawDocument:
    """One document as it lies in its file; `text()` decodes it."""

    source: str
    """The file."""
    record: str
    """Which of the file's records, for messages: "line 3", "row 7", "a/0001.txt"; "" where the file is the document."""
    offset: int
    """Where `raw` begins in the file, in bytes, after decompression."""
    raw: bytes
    json: bool
    """A JSON object that holds the text under a key, rather than the text."""

    def text(self, text_key: str = "text") -> str:
        """The document's text. Raises UndecodableError if it is none, DataError if `text_key` is not there at all."""
        try:
            text = self.raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._undecodable(f"not UTF-8 at byte {self.offset + error.start}") from None
        if self.json:
            return self._json_text(text, text_key)
        if not self.record and "\0" in text:
            raise self._undecodable(f"binary, not text (NUL at byte {self.offset + self.raw.index(0)})")
        return text if self.record else text.removeprefix("\ufeff")

    def _json_text(self, line: str, text_key: str) -> str:
        try:
            value = json.loads(line.removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            raise self._undecodable(f"not JSON ({error}; the line begins at byte {self.offset})") from None
        if not isinstance(value, dict):
            raise self._undecodable(f"a JSON {type(value).__name__}, not an object")
        if text_key not in value:
            raise DataError(f"{self._where()}: no key {text_key!r}; {tables.suggest(text_key, value, 'text key')}")
        text = value[text_key]
        if not isinstance(text, str):
            raise self._undecodable(f"{text_key!r} is {json.dumps(text)[:40]}, not a string")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self._undecodable(f"lone surrogate {text[error.start]!r} in {text_key!r}") from None
        return text

    def _where(self) -> str:
        return f"{self.source}, {self.record}" if self.record else self.source

    def _undecodable(self, reason: str) -> UndecodableError:
        return UndecodableError(f"{self._where()}: {reason}")


class DocumentReader:
    """Iterates over the documents of `inputs` (files and directories), with progress in bytes.

    Of all bytes of all files, one after the other, share i of n takes the i-th n-th: the documents that begin in it. So
    the shares in order are the whole. Compressed files, archives and plain texts are not divided.

    Args:
        files: What `find_files` has found, if it was asked before.

    Raises:
        DataError: At construction for inputs that do not exist or hold no file, later for what cannot be read.
    """

    def __init__(
        self,
        inputs: Iterable[str | Path],
        text_key: str = "text",
        share: int = 0,
        shares: int = 1,
        files: list[tuple[Path, int]] | None = None,
    ) -> None:
        self.files = find_files(inputs) if files is None else files
        self.text_key = text_key
        whole = sum(size for _, size in self.files)
        self._first, self._end = (whole * i // shares for i in (share, share + 1))
        self.total_bytes = self._end - self._first
        """Size of the share, on disk."""
        self._end += share == shares - 1  # empty files behind the last byte
        self.bytes_read = 0
        """How much of `total_bytes` has been read."""

    def __iter__(self) -> Iterator[RawDocument]:
        before = 0
        for path, size in self.files:
            first, end = max(0, self._first - before), self._end - before
            if first < max(1, size) and end > 0:
                with explain_os_errors("read", path):
                    try:
                        for document, position in self._read(path, size, first, end):
                            self._advance(before + position)
                            yield document
                    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                        raise DataError(f"{path}: broken compressed file ({error})") from error
            before += size
        self.bytes_read = self.total_bytes  # a file that is not divided may reach far into other shares

    def _advance(self, position: int) -> None:
        self.bytes_read = min(max(self.bytes_read, position - self._first), self.total_bytes)

    def _read(self, path: Path, size: int, first: int, end: int) -> Iterator[tuple[RawDocument, int]]:
        """Documents of one file that begin at its bytes [first, end), each with the position in the file behind it."""
        if path.suffix in tables.SUFFIXES:
            for row, raw, position in tables.read_table(path, size, self.text_key, first, end):
                yield RawDocument(str(path), f"row {row}", 0, raw, json=False), position
            return
        with path.open("rb") as file:
            if path.suffix in JSON_LINES:
                yield from _lines(path, file, first, end)
                return
            if first > 0:
                return  # it begins in an earlier share
            stream, name = _decompressed(file, path)
            if Path(name).suffix in JSON_LINES:
                for document, _ in _lines(path, stream):
                    yield document, file.tell()
            elif Path(name).suffix in TAR:
                for member, raw, is_json in read_archive(path, stream):
                    yield RawDocument(str(path), member, 0, raw, is_json), file.tell()
            else:
                yield RawDocument(str(path), "", 0, stream.read(), json=False), size


def _lines(path: Path, stream: IO[bytes], first: int = 0, end: int | None = None) -> Iterator[tuple[RawDocument, int]]:
    """Lines that begin at bytes [first, end) of a stream, without blank ones, each with the position behind it."""
    offset = first
    if first:
        stream.seek(first - 1)
        offset += len(stream.readline()) - 1  # the line that the byte before belongs to began before
    for number, line in enumerate(stream, start=1):
        if end is not None and offset >= end:
            return
        record = f"byte {offset}" if first else f"line {number}"
        start, offset = offset, offset + len(line)
        if line.strip():
            yield RawDocument(str(path), record, start, line, json=True), offset


def find_files(inputs: Iterable[str | Path]) -> list[tuple[Path, int]]:
    """The regular files that `inputs` name, with their sizes; directories walked in sorted order."""
    files: list[tuple[Path, int]] = []
    for given in inputs:
        path = Path(given)
        with explain_os_errors("read", path):
            mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            found = list(_walk(path))
            if not found:
                raise DataError(f"no files in the directory {path}")
            files += found
        elif stat.S_ISREG(mode):
            files.append((path, path.stat().st_size))
        else:
            raise DataError(f"{path} is neither a file nor a directory")
    if not files:
        raise DataError("no input given")
    return files


def _walk(root: Path) -> Iterator[tuple[Path, int]]:
    def fail(error: OSError) -> None:
        raise DataError(f"cannot read {error.filename}: {error.strerror}")

    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(folder, name)
            with explain_os_errors("read", path):
                status = path.stat()
            if stat.S_ISREG(status.st_mode):
                yield path, status.st_size


def _decompressed(file: IO[bytes], path: Path) -> tuple[IO[bytes], str]:
    """The stream behind .gz or .zst, and the file name without that ending."""
    if path.suffix in (".gz", ".tgz"):
        name = path.stem if path.suffix == ".gz" else f"{path.stem}.tar"
        return gzip.GzipFile(fileobj=file), name  # type: ignore[return-value]
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdStream(file, path), 1 << 20), path.stem
    return file, path.name


class _ZstdStream(io.RawIOBase):
    """Decompresses Zstandard frames and, unlike zstandard's own reader, notices a truncated last one."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise DataError(f"reading {path} needs the package zstandard: pip install zstandard") from None
        self._zstd, self._file = zstandard, file
        self._frame: Any = None
        self._compressed = self._plain = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain and self._advance():
            pass
        count = min(len(buffer), len(self._plain))
        buffer[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count

    def _advance(self) -> bool:
        """Decompress the next piece into `_plain`; False at the end of the file."""
        self._compressed = self._compressed or self._file.read(1 << 16)
        if not self._compressed:
            if self._frame is not None:
                raise EOFError("it ends within a Zstandard frame")
            return False
        if self._frame is None:
            self._frame = self._zstd.ZstdDecompressor().decompressobj()
        try:
            self._plain = self._frame.decompress(self._compressed)
        except self._zstd.ZstdError as error:
            raise EOFError(error) from error
        self._compressed = b""
        if self._frame.eof:
            self._compressed, self._frame = self._frame.unused_data, None
        return True
