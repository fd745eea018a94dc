"""Megatron's .bin/.idx datasets, version 1: what Megatron-LM, Megatron-DeepSpeed and GPT-NeoX read and write.

The .bin holds all tokens, one after the other. The .idx, little-endian:

    9 bytes   "MMIDIDX" and two NULs
    uint64    version, 1
    uint8     code of the tokens' dtype
    uint64    S, number of sequences
    uint64    D, number of document indices: documents + 1
    int32[S]  length of each sequence, in tokens
    int64[S]  where each sequence begins in the .bin, in bytes
    int64[D]  the sequence with which each document begins, and at the end S
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import secrets
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from megatron_stable.errors import DataError
from megatron_stable.files import explain_os_errors, sync_directory

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {code: np.dtype(name) for code, name in ((1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"))}
"""Codes of the integer dtypes; 6 and 7 are floating point, which tokens are not."""
MAX_LENGTH = 2**31 - 1
BLOCK, MAX_BLOCKS = 1 << 20, 16


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Megatron's rule: uint16 below 65500 tokens, else int32."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


def dataset_paths(prefix: str | Path) -> tuple[Path, Path, Path]:
    """The .bin, the .idx, and the .meta.json that `preprocess` puts beside them."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.meta.json")


class IndexedDataset:
    """A .bin/.idx pair, memory-mapped and read-only: one stream of tokens, documents in order.

    Opening validates header, sizes and index against each other (beyond 16 Mi sequences, 16 evenly spaced blocks of
    the index). Raises DataError, naming the file and what is wrong with it.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        bin_path, idx_path = find_files(prefix)
        index = _map(idx_path)
        self.dtype, sequences, documents = _read_header(idx_path, index[: HEADER.size], len(index))
        self.documents = documents - 1
        """Number of documents."""
        # The header's 34 bytes leave these unaligned: numpy would copy them whole to search them, bisect does not.
        lengths = np.frombuffer(index, "<i4", sequences, HEADER.size)
        self._pointers = np.frombuffer(index, "<i8", sequences, HEADER.size + 4 * sequences)
        self._first_sequence = np.frombuffer(index, "<i8", documents, HEADER.size + 12 * sequences)
        self._bytes = bin_path.stat().st_size
        self._validate(lengths, bin_path, idx_path)
        self.tokens = self._bytes // self.dtype.itemsize
        """Number of tokens."""
        self._map = _map(bin_path)
        self._tokens = np.frombuffer(self._map, self.dtype)

    def _validate(self, lengths: np.ndarray, bin_path: Path, idx_path: Path) -> None:
        size, sequences, first = self.dtype.itemsize, len(lengths), self._first_sequence
        promised = int(self._pointers[-1]) + int(lengths[-1]) * size if sequences else 0
        _check_size(bin_path, idx_path, self._bytes, promised)
        if promised == 0:
            raise DataError(f"{bin_path} holds no tokens")
        for start, stop in _blocks(sequences):
            begin = self._pointers[start:stop]
            end = np.append(self._pointers[start + 1 : stop + 1], [promised] if stop == sequences else [])
            length = lengths[start:stop]
            if (length < 0).any() or (begin + length * np.int64(size) != end).any():
                raise DataError(f"{idx_path} is corrupt: sequences {start} .. {stop - 1} do not follow each other")
        if self._pointers[0] != 0 or first[0] != 0 or first[-1] != sequences:
            raise DataError(f"{idx_path} is corrupt: its documents do not cover its {sequences} sequences")
        for start, stop in _blocks(len(first)):
            if (np.diff(first[start : stop + 1]) < 0).any():
                raise DataError(f"{idx_path} is corrupt: documents {start} .. {stop - 1} are out of order")

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens `start .. start + count - 1` of the stream: a read-only view `[count]` of the file's dtype."""
        if not 0 <= start <= start + count <= self.tokens:
            raise IndexError(f"tokens {start} .. {start + count - 1} of {self.tokens}")
        return self._tokens[start : start + count]

    def will_need(self, start: int, count: int) -> None:
        """Tell the operating system to fetch these tokens in the background; has no other effect."""
        if hasattr(mmap, "MADV_WILLNEED"):
            begin = start * self.dtype.itemsize
            page = begin - begin % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page, begin - page + count * self.dtype.itemsize)

    def document_at(self, token: int) -> int:
        """The document (from 0) to which the stream's token number `token` belongs; O(log documents)."""
        if not 0 <= token < self.tokens:
            raise IndexError(f"token {token} of {self.tokens}")
        sequence = bisect_right(self._pointers, token * self.dtype.itemsize) - 1
        return bisect_right(self._first_sequence, sequence) - 1

    def document_span(self, document: int) -> tuple[int, int]:
        """First token of a document, and the first behind it."""
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document} of {self.documents}")
        bounds = (int(self._first_sequence[document]), int(self._first_sequence[document + 1]))
        size, sequences = self.dtype.itemsize, len(self._pointers)
        start, stop = (int(self._pointers[s]) // size if s < sequences else self.tokens for s in bounds)
        return start, stop

    glance = document_span

    @property
    def metadata(self) -> dict[str, Any] | None:
        """What `preprocess` noted about the dataset; None for datasets of other origin."""
        return read_metadata(self.prefix)

    @property
    def notes(self) -> Path | None:
        """The file of the metadata."""
        return dataset_paths(self.prefix)[2]

    @property
    def stamp(self) -> dict[str, int]:
        """What changes when the tokens do."""
        status = dataset_paths(self.prefix)[0].stat()
        return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


@dataclass(frozen=True)
class Head:
    """What can be known of a dataset without reading its index: O(1) time, and no file stays open."""

    prefix: str
    dtype: np.dtype[Any]
    documents: int
    tokens: int
    bytes: int
    mtime_ns: int


def read_head(prefix: str | Path) -> Head:
    """Read an index's header and its last sequence. Raises DataError if sizes do not match these."""
    bin_path, idx_path = find_files(prefix)
    with explain_os_errors("read", idx_path), idx_path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        dtype, sequences, documents = _read_header(idx_path, file.read(HEADER.size), size)
        promised = 0
        if sequences:
            file.seek(HEADER.size + 4 * (sequences - 1))
            (length,) = struct.unpack("<i", file.read(4))
            file.seek(HEADER.size + 12 * sequences - 8)
            promised = struct.unpack("<q", file.read(8))[0] + length * dtype.itemsize
        status = bin_path.stat()
    _check_size(bin_path, idx_path, status.st_size, promised)
    tokens = promised // dtype.itemsize
    return Head(str(prefix), dtype, documents - 1, tokens, promised, status.st_mtime_ns)


def read_span(head: Head, document: int) -> tuple[int, int]:
    """First token of a document, and the first behind it, by the four numbers of the index that say so: nothing is
    mapped, nor checked."""
    path = dataset_paths(head.prefix)[1]
    with explain_os_errors("read", path), path.open("rb", buffering=0) as file:
        _, sequences, _ = _read_header(path, file.read(HEADER.size), os.fstat(file.fileno()).st_size)

        def number(place: int) -> int:
            found = os.pread(file.fileno(), 8, HEADER.size + place)
            return int.from_bytes(found, "little", signed=True)

        def begin(document: int) -> int:
            sequence = number(12 * sequences + 8 * document)
            return number(4 * sequences + 8 * sequence) // head.dtype.itemsize if sequence < sequences else head.tokens

        return begin(document), begin(document + 1)


def find_files(prefix: str | Path) -> tuple[Path, Path]:
    """The .bin and the .idx of a dataset. Raises DataError where one is missing."""
    bin_path, idx_path, _ = dataset_paths(prefix)
    for path in (idx_path, bin_path):
        if not path.is_file():
            hint = "; give the prefix without .bin or .idx" if str(prefix).endswith((".bin", ".idx")) else ""
            raise DataError(f"no dataset {prefix}: {path} does not exist{hint}")
    return bin_path, idx_path


def read_metadata(prefix: str | Path) -> dict[str, Any] | None:
    """What `preprocess` noted about a dataset; None if it has no notes. Raises DataError for what it did not write."""
    path = dataset_paths(prefix)[2]
    if not path.exists():
        return None
    try:
        metadata = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is unreadable ({error}); remove it, or run preprocess again") from error
    if not isinstance(metadata, dict):
        raise DataError(f"{path} is not what preprocess writes; remove it, or run preprocess again")
    return metadata


def _check_size(bin_path: Path, idx_path: Path, found: int, promised: int) -> None:
    if found != promised:
        state = "truncated" if found < promised else "too long"
        raise DataError(f"{bin_path} is {state}: {found} bytes, {idx_path} says {promised}")


def _map(path: Path) -> mmap.mmap:
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    with explain_os_errors("read", path), path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_header(path: Path, header: bytes, size: int) -> tuple[np.dtype[Any], int, int]:
    """Dtype of the tokens, number of sequences, number of document indices; of an index of `size` bytes."""
    if header[: len(MAGIC)] != MAGIC[: len(header)]:
        known = " (fairseq's old format: write it again with --dataset-impl mmap)" if header[:6] == b"TNTIDX" else ""
        raise DataError(f"{path} is not a Megatron index: it begins with {header[:9]!r}, not {MAGIC!r}{known}")
    if len(header) < HEADER.size:
        raise DataError(f"{path} is truncated: {size} bytes, its header alone has {HEADER.size}")
    _, version, code, sequences, documents = HEADER.unpack(header)
    if version != 1:
        raise DataError(f"{path} is an index of version {version}; this reads version 1")
    if code not in DTYPES:
        raise DataError(f"{path} has dtype code {code}, which is no integer type of tokens ({sorted(DTYPES)} are)")
    promised = HEADER.size + 12 * sequences + 8 * documents
    if size != promised or documents < 1:
        state = "truncated" if size < promised else "corrupt"
        raise DataError(
            f"{path} is {state}: {size} bytes, but {promised} for its {sequences} sequences and "
            f"{documents} document indices"
        )
    return DTYPES[code], sequences, documents


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    """Ranges that cover `range(count)`, or the first, the last and evenly spaced ones between."""
    blocks = -(-count // BLOCK)
    for i in range(min(blocks, MAX_BLOCKS)):
        block = i if blocks <= MAX_BLOCKS else i * (blocks - 1) // (MAX_BLOCKS - 1)
        yield block * BLOCK, min((block + 1) * BLOCK, count)


class IndexedWriter:
    """Writes a .bin/.idx pair, streaming; as a context manager, publishes it at the end, or nothing after an error.

    Until then the files carry names of this writer's own, so that two that write the same prefix do not touch each
    other's. What a killed writer has left is removed by the next one of that prefix: a lock tells the living apart,
    which no machine can leave behind; where a file system has none that other machines see, a writer may find its files
    gone when it publishes, and nothing else is harmed.

    Files of the same prefix are replaced: the .idx goes first and comes last, so that no reader sees an index with
    another's tokens. Raises DataError where writing fails.

    Args:
        same: An .idx that is there can only be of the same bytes, and stays until the new one takes its place.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike, same: bool = False) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = next((code for code, known in DTYPES.items() if known == self.dtype), None)
        if self._code is None:
            raise ValueError(f"Megatron's format has no dtype {dtype}")
        self.paths, self._same, self._aborted = dataset_paths(prefix), same, False
        self.tokens = 0
        self.documents = 0
        """Number of documents so far."""
        with explain_os_errors("write", self.paths[0]):
            self.paths[0].parent.mkdir(parents=True, exist_ok=True)
            _sweep(self.paths[0])
            self._partials = _partials(self.paths[0], secrets.token_hex(4))
            while not self._partials[0].exists():  # somebody may sweep before it is locked
                self._file = self._partials[0].open("wb", buffering=1 << 20)
                with suppress(OSError):  # this file system has no locks
                    fcntl.flock(self._file, fcntl.LOCK_EX)
            self._index = self._partials[1].open("w+b", buffering=1 << 16)
            self._index.write(bytes(HEADER.size))  # until the numbers in it are known

    def add(self, tokens: ArrayLike, lengths: Sequence[int] | None = None) -> None:
        """Append documents: their tokens one after the other `[sum(lengths)]`; without `lengths`, one document."""
        given = np.asarray(tokens)
        lengths = [len(given)] if lengths is None else lengths
        if sum(lengths) != len(given):
            raise ValueError(f"lengths sum to {sum(lengths)}, there are {len(given)} tokens")
        limits = np.iinfo(self.dtype)
        if given.size and not (limits.min <= given.min() and given.max() <= limits.max):
            raise DataError(f"token ids {given.min()} .. {given.max()} do not fit the dtype {self.dtype}")
        if max(lengths, default=0) > MAX_LENGTH:
            raise DataError(f"a document of {max(lengths)} tokens; Megatron's format allows {MAX_LENGTH}: split it")
        with explain_os_errors("write", self.paths[0]):
            self._file.write(given.astype(self.dtype, copy=False).tobytes())
        with explain_os_errors("write", self.paths[1]):
            self._index.write(np.asarray(lengths, "<i4").tobytes())
        self.documents += len(lengths)
        self.tokens += len(given)

    def close(self, metadata: dict[str, Any] | None = None) -> None:
        """Complete the files, still under their other names; `metadata` is what a reader finds as `.metadata`."""
        bin_path, idx_path, meta_path = self.paths
        with explain_os_errors("write", bin_path):
            self._file.flush()
            os.fsync(self._file.fileno())
        with explain_os_errors("write", idx_path), self._index as file:
            begin = 0
            for start in range(0, self.documents, BLOCK):  # in blocks: there may be more documents than memory
                file.seek(HEADER.size + 4 * start)
                lengths = np.frombuffer(file.read(4 * min(BLOCK, self.documents - start)), "<i4")
                ends = begin + np.cumsum(lengths, dtype=np.int64)
                file.seek(0, os.SEEK_END)
                file.write(((ends - lengths) * self.dtype.itemsize).astype("<i8", copy=False).tobytes())
                begin = int(ends[-1])
            for start in range(0, self.documents + 1, BLOCK):
                file.write(np.arange(start, min(start + BLOCK, self.documents + 1), dtype="<i8").tobytes())
            file.seek(0)
            file.write(HEADER.pack(MAGIC, 1, self._code, self.documents, self.documents + 1))
            file.flush()
            os.fsync(file.fileno())
        if metadata is not None:
            with explain_os_errors("write", meta_path), self._partials[2].open("wb") as file:
                file.write((json.dumps(metadata, indent=2) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())

    def publish(self) -> None:
        """Give the completed files their names."""
        bin_path, idx_path, meta_path = self.paths
        with explain_os_errors("write", idx_path):
            if not self._same:
                idx_path.unlink(missing_ok=True)
                meta_path.unlink(missing_ok=True)
            for path, written in zip((bin_path, meta_path, idx_path), (0, 2, 1), strict=True):
                if path != meta_path or self._partials[2].exists():
                    self._partials[written].replace(path)
                    sync_directory(path.parent)

    def abort(self) -> None:
        """Remove what was written, and publish nothing."""
        self._aborted = True
        for path in reversed(self._partials):
            path.unlink(missing_ok=True)
        for file in (self._file, self._index):
            with suppress(OSError):  # on a full disk, closing fails to flush once more
                file.close()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None and not self._aborted:
                if not self._index.closed:
                    self.close()
                self.publish()
        finally:
            self.abort()


def _partials(bin_path: Path, writer: str) -> tuple[Path, ...]:
    """What a writer's files are called until they are complete, in the order of `dataset_paths`."""
    return tuple(path.with_name(f"{path.name}.{writer}.partial") for path in dataset_paths(bin_path.with_suffix("")))


def _sweep(bin_path: Path) -> None:
    """Remove what writers of these files have left that are no more."""
    for left in bin_path.parent.glob(f"{escape(bin_path.name)}.*.partial"):
        with suppress(OSError), left.open("r+b") as file:  # OSError: it is being written, or somebody else was faster
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in reversed(_partials(bin_path, left.name.split(".")[-2])):
                path.unlink(missing_ok=True)
