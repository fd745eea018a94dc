"""Weights on disk: safetensors of bounded size, written and read a piece of a tensor at a time.

A file is the length of its header, 64 bits, little-endian; the header, JSON with each tensor's type, shape and offsets;
and the bytes. All of the header is known beforehand, so that nothing has to be held to write it; the library holds a
whole file. What is read goes through no memory map: a file that is cut off is found out before anything else is done.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_stable.disk import LARGEST_JSON, parsed
from megatron_stable.errors import DataError
from megatron_stable.files import replace_file

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
READABLE = {name: dtype for dtype, name in NAMES.items()}
Shapes = Mapping[str, tuple[int, ...]]


def bundled(groups: Iterable[Shapes], dtype: torch.dtype, most: int) -> list[dict[str, tuple[int, ...]]]:
    """Tensors that are written together, put into files of at most ``most`` bytes, or one group each, in order."""
    files: list[dict[str, tuple[int, ...]]] = []
    room = 0
    for group in groups:
        size = sum(prod(shape) for shape in group.values()) * dtype.itemsize
        if not files or size > room:
            files.append({})
            room = most
        files[-1] |= group
        room -= size
    return files


def write_file(path: Path, shapes: Shapes, dtype: torch.dtype, pieces: Iterator[Tensor]) -> int:
    """Write one file, and make it durable. OSError: it cannot be written.

    Args:
        pieces: All elements of the tensors, in order, in pieces of any size.

    Returns:
        Bytes of the tensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    left = end
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while left:
            piece = next(pieces).to(dtype).contiguous().view(-1).view(torch.uint8)
            file.write(piece.numpy().data)
            left -= piece.numel()
        assert left == 0, "pieces end where tensors do"
        file.flush()
        os.fsync(file.fileno())
    return end


def write_index(directory: Path, files: Mapping[str, Shapes], size: int) -> None:
    """Say which file holds which tensor."""
    held = {name: file for file, shapes in files.items() for name in shapes}
    body = {"metadata": {"total_size": size}, "weight_map": held}
    replace_file(directory / INDEX, json.dumps(body, indent=2).encode())


class WeightFile:
    """A safetensors file. DataError: it is none, or is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
            size = os.fstat(self._file.fileno()).st_size
            length = self._file.read(8)
            (count,) = struct.unpack("<Q", length) if len(length) == 8 else (size,)
            if not 0 < count <= min(size - 8, LARGEST_JSON):
                raise DataError(f"{path}: no safetensors file, or cut off: {size} bytes")
            header = parsed(self._file.read(count), path)
            self._start, self._data = 8 + count, size - 8 - count
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from None
        if not isinstance(header, dict):
            raise DataError(f"{path}: no safetensors file: its header is no object")
        header.pop("__metadata__", None)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._where: dict[str, tuple[torch.dtype, int]] = {}
        for name, entry in header.items():
            self._take(name, entry)

    def _take(self, name: str, entry: Any) -> None:
        try:
            dtype, shape, (start, stop) = entry["dtype"], tuple(map(int, entry["shape"])), entry["data_offsets"]
            sound = 0 <= start <= stop and all(extent >= 0 for extent in shape)
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise DataError(f"{self.path}: no safetensors file: its header does not say where {name!r} is")
        if stop > self._data:
            raise DataError(
                f"{self.path}: cut off: {name} ends at byte {self._start + stop}, the file at "
                f"{self._start + self._data}; copy it again"
            )
        self.shapes[name] = shape
        if dtype in READABLE:  # a buffer of integers is for the class that made it
            if stop - start != prod(shape) * READABLE[dtype].itemsize:
                raise DataError(f"{self.path}: no safetensors file: {name} is not as long as its shape says")
            self._where[name] = READABLE[dtype], start

    def read(self, name: str, low: int, high: int) -> Tensor:
        """Elements ``[low, high)`` of a tensor, 1-d fp32."""
        if name not in self._where:
            raise DataError(
                f"{self.path}: {name} is of a type that is no weight's; one of {', '.join(READABLE)} is needed"
            )
        dtype, start = self._where[name]
        data = torch.empty((high - low) * dtype.itemsize, dtype=torch.uint8)
        view, done = data.numpy().data, 0
        while done < len(view):
            offset = self._start + start + low * dtype.itemsize + done
            try:
                count = os.preadv(self._file.fileno(), [view[done:]], offset)
            except OSError as error:
                raise DataError(f"cannot read {self.path}: {error.strerror or error}") from None
            if not count:
                raise DataError(f"{self.path}: cut off at byte {offset}")
            done += count
        return data.view(dtype).float()

    def close(self) -> None:
        """Give its file descriptor back."""
        self._file.close()


class Weights:
    """The tensors of a directory, by name.

    Raises:
        DataError: There are none, or they are in a format that can run code, or a file is missing or cut off.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file_of: dict[str, WeightFile] = {}
        for path in self._paths():
            file = WeightFile(path)
            self.file_of |= dict.fromkeys(file.shapes, file)

    def _paths(self) -> list[Path]:
        index = self.directory / INDEX
        if index.is_file():
            body = parsed(index.read_bytes(), index)
            held = body.get("weight_map") if isinstance(body, dict) else None
            if not isinstance(held, dict) or not all(isinstance(name, str) for name in held.values()):
                raise DataError(f"{index}: it has no weight_map")
            names = sorted(set(held.values()))
            if wrong := next((name for name in names if Path(name).name != name), None):
                raise DataError(f"{index}: {wrong!r} is no file of this directory")
            return [self.directory / name for name in names]
        if (self.directory / SINGLE).is_file():
            return [self.directory / SINGLE]
        pickles = sorted(
            path.name for ending in ("bin", "pt", "pth", "ckpt") for path in self.directory.glob(f"*.{ending}")
        )
        if pickles:
            raise DataError(
                f"{self.directory} has its weights in {pickles[0]}, a pickle, which can run code when it is read: "
                "have it saved as safetensors (save_pretrained(..., safe_serialization=True)) where you trust it"
            )
        raise DataError(f"{self.directory} has no weights: neither {SINGLE} nor {INDEX} is there")

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a tensor; ``None``: there is none."""
        return self.file_of[name].shapes[name] if name in self.file_of else None

    def read(self, name: str, low: int = 0, high: int | None = None) -> Tensor:
        """Elements ``[low, high)`` of a tensor, 1-d fp32."""
        file = self.file_of[name]
        return file.read(name, low, prod(file.shapes[name]) if high is None else high)

    def close(self) -> None:
        """Give file descriptors back."""
        for file in set(self.file_of.values()):
            file.close()
