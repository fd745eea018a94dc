"""A rank's file: tensors in the safetensors format, with checksums that are taken on the way out.

The format is a JSON header, its length in front as a little-endian 64-bit integer, and the tensors' bytes behind it at
the offsets that the header names. The header's metadata holds, under each tensor's key, the checksums of its chunks,
one after another, and the checkpoint's index a checksum of the header. So whoever reads a part of a tensor verifies
that part, up to whole chunks, in the same pass, and nobody reads what was written to find out what it was.

The safetensors library writes whole files only, and reads through a memory map, where an error of the file system is a
signal that ends the process. xxh3_128 (https://xxhash.com) finds damage, not forgery, as does any checksum that
lies beside what it vouches for.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from torch import Tensor
from xxhash import xxh3_128_hexdigest

from megatron_stable.disk import LARGEST_JSON, Damaged, open_plain, parsed, patiently
from megatron_stable.errors import DataError
from megatron_stable.persisted import Count, Persisted, validated

BYTES = 4  # of an fp32 element
CHUNK = 2**20  # elements that have a checksum of their own
DIGITS = 32  # of a checksum


class FileEntry(Persisted):
    """A rank's file, as the index has it: its size, and the checksum of its header."""

    bytes: Count
    header: str


class StoredTensor(Persisted):
    """A tensor, as the header of a rank's file has it."""

    dtype: Literal["F32"]
    shape: tuple[Count]
    data_offsets: tuple[Count, Count]


class Header(Persisted):
    """What the header of a rank's file says: its tensors, and their chunks' checksums."""

    tensors: dict[str, StoredTensor]
    sums: dict[str, str]


def write_tensors(
    path: Path, sizes: Mapping[str, int], tensor: Callable[[str], Tensor | Iterable[Tensor]]
) -> FileEntry:
    """Write 1-d fp32 tensors on the host, one at a time, and make the file durable. OSError: it cannot be written.

    Args:
        path: The file.
        sizes: Elements of each tensor, by key, in the order of the file.
        tensor: Returns the tensor of a key, or the pieces of it, in order: whole chunks each, but for the last.
    """
    sums = {key: "0" * DIGITS * -(-numel // CHUNK) for key, numel in sizes.items()}
    with path.open("wb") as file:
        file.write(_header(sizes, sums))  # holds the place
        for key in sizes:
            found = tensor(key)
            sums[key] = ""
            for piece in (found,) if isinstance(found, Tensor) else found:
                data = piece.contiguous().numpy()
                for low in range(0, len(data), CHUNK):
                    chunk = data[low : low + CHUNK].data
                    sums[key] += xxh3_128_hexdigest(chunk)
                    file.write(chunk)
        size = file.tell()
        file.seek(0)
        file.write(header := _header(sizes, sums))
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(bytes=size, header=xxh3_128_hexdigest(header))


def _header(sizes: Mapping[str, int], sums: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt", **sums}}
    end = 0
    for key, numel in sizes.items():
        begin, end = end, end + numel * BYTES
        header[key] = {"dtype": "F32", "shape": [numel], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the library wants the data aligned
    return struct.pack("<Q", len(text)) + text


class TensorFile:
    """A rank's file, to be read. Every byte that is returned was verified; memory is taken for what is really there.

    Args:
        path: The file.
        entry: What the index says of it.

    Raises:
        Damaged: It is not what was written.
        Unreadable: It cannot be read.
        DataError: It is nothing that :func:`write_tensors` writes.
    """

    def __init__(self, path: Path, entry: FileEntry) -> None:
        self.path, self._size = path, entry.bytes
        self._file: BinaryIO | None = None
        length = bytearray(8)
        self._fill(0, memoryview(length))
        if 8 + (size := struct.unpack("<Q", length)[0]) > min(entry.bytes, LARGEST_JSON):
            raise Damaged(f"{path}: its header is longer than the file")
        text = bytearray(size)
        self._fill(8, memoryview(text))
        if xxh3_128_hexdigest(length + text) != entry.header:
            raise Damaged(f"{path}: the checksum of its header does not match the index: the file is damaged")
        self._start, header = 8 + size, parsed(bytes(text), path)
        if not isinstance(header, dict):
            raise DataError(f"{path}: not a rank's file of a checkpoint")
        sums = header.pop("__metadata__", {})
        self._header = validated(Header, {"tensors": header, "sums": sums}, path)

    def read(self, key: str, numel: int, low: int, high: int) -> Tensor:
        """Elements ``[low, high)`` of a tensor that has ``numel``, 1-d fp32."""
        sums = self._checked(key, numel)
        found = torch.empty(high - low)
        for number in range(low // CHUNK, -(-high // CHUNK)):
            begin, end = number * CHUNK, min((number + 1) * CHUNK, numel)
            inside = low <= begin and end <= high
            chunk = found[begin - low : end - low] if inside else torch.empty(end - begin)
            data = chunk.numpy().data.cast("B")
            self._fill(self._start + self._header.tensors[key].data_offsets[0] + begin * BYTES, data)
            if xxh3_128_hexdigest(data) != sums[number * DIGITS : (number + 1) * DIGITS]:
                raise Damaged(f"{self.path}: the checksum of {key} does not match: the file is damaged")
            if not inside:
                first, last = max(low, begin), min(high, end)
                found[first - low : last - low] = chunk[first - begin : last - begin]
        return found

    def verify(self) -> None:
        """Read all of it."""
        for key, tensor in self._header.tensors.items():
            (numel,) = tensor.shape
            for low in range(0, numel, CHUNK):
                self.read(key, numel, low, min(low + CHUNK, numel))

    @property
    def is_open(self) -> bool:
        """Whether it holds a file descriptor; it is opened again when need be."""
        return self._file is not None

    def close(self) -> None:
        """Give its file descriptor back."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _checked(self, key: str, numel: int) -> str:
        """The checksums of a tensor, which is where and what it should be."""
        tensor = self._header.tensors.get(key)
        if tensor is None or tensor.shape != (numel,):
            raise DataError(f"{self.path}: {key} is not what the index says")
        begin, end = tensor.data_offsets
        sums = self._header.sums.get(key, "")
        if end - begin != numel * BYTES or self._start + end > self._size or len(sums) != DIGITS * -(-numel // CHUNK):
            raise DataError(f"{self.path}: {key} is not where the header says")
        return sums

    def _fill(self, start: int, data: memoryview) -> None:
        """Read the bytes from ``start`` on, as many as ``data`` has room for."""

        def read() -> None:
            try:
                if self._file is None:
                    self._file = open_plain(self.path)
                    if (size := os.fstat(self._file.fileno()).st_size) != self._size:
                        raise Damaged(f"{self.path}: {size} bytes instead of {self._size}")
                done = 0
                while done < len(data):
                    count = os.preadv(self._file.fileno(), [data[done:]], start + done)
                    if not count:
                        raise Damaged(f"{self.path}: it ends before byte {start + len(data)}")
                    done += count
            except (OSError, Damaged):
                self.close()  # a stale handle stays stale
                raise

        patiently(read, self.path)
