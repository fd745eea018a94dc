"""Read any part of any parameter from a checkpoint, whatever layout wrote it."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_stable.checkpoint.format import Manifest, StoredParameter, StoredSlice, rank_file, read_index
from megatron_stable.checkpoint.tensors import TensorFile
from megatron_stable.errors import DataError
from megatron_stable.parallel.shards import Place, Shard

MOST_OPEN = 64  # files at a time


class Reader:
    """The tensors of one checkpoint. Of the files nothing is read before it is asked for, and what is read is verified.
    Nothing is trusted.

    Memory is taken for what the caller wants and for what the files really hold, never for what they claim.

    Attributes:
        parameters: What is stored of each, by name.

    Raises:
        Damaged: A checksum does not match.
        Unreadable: A file cannot be read.
        DataError: A file describes tensors that it does not hold, or the checkpoint does not hold what is wanted.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        index = read_index(directory, manifest)
        self.parameters, self._entries = index.parameters, index.files
        self._files: dict[str, TensorFile] = {}
        self._open: deque[TensorFile] = deque()

    def names(self) -> list[str]:
        """Global names of the stored parameters."""
        return sorted(self.parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a stored parameter."""
        return self._parameter(name).shape

    def full(self, name: str, kind: str, shape: tuple[int, ...]) -> Tensor:
        """A whole parameter (``kind`` "weight") or a moment of it, fp32, of the ``shape`` that the model expects."""
        return self.part(kind, Shard(Place(shape, name=name), 0, prod(shape))).view(shape)

    def part(self, kind: str, wanted: Shard) -> Tensor:
        """A shard, whichever that is, of a parameter or a moment of it, 1-d fp32.

        Rows of dimension 0 may differ by the padding of the vocabulary: missing ones are zeros, surplus ones are
        dropped. Where tensor parallelism sliced as it does now, just the elements that are wanted are read; else their
        rows, of which a stored slice along another dimension may hold more than is wanted.
        """
        name, expected = wanted.place.name, wanted.place.full_shape
        stored = self._parameter(name)
        if stored.shape[1:] != expected[1:]:
            have = list(stored.shape)
            raise DataError(f"{self.directory}: {name} has shape {have}, the model expects {list(expected)}")
        if not wanted.numel:
            return torch.empty(0)
        for part in stored.slices:
            if stored.shape == expected and stored.place(part).box == wanted.place.box:
                return self._elements(f"{name}:{kind}", part, wanted.start, wanted.start + wanted.numel)
        row = prod(wanted.place.shape[1:])
        first, last = wanted.start // row, (wanted.start + wanted.numel - 1) // row + 1
        box = wanted.place.box
        box[0] = (box[0][0] + first, box[0][0] + last)
        rows = torch.zeros([high - low for low, high in box])
        for part in stored.slices:
            self._copy_overlap(f"{name}:{kind}", stored, part, box, rows)
        return rows.flatten()[wanted.start - first * row :][: wanted.numel]

    def verify(self) -> None:
        """Read all files, and compare all checksums."""
        for name in sorted(self._entries):
            self._file(name).verify()

    def close(self) -> None:
        """Give file descriptors back; what is asked for next opens its file again."""
        while self._open:
            self._open.popleft().close()

    def _copy_overlap(
        self, key: str, stored: StoredParameter, part: StoredSlice, box: list[tuple[int, int]], rows: Tensor
    ) -> None:
        """Fill in what a stored slice has of ``rows``, the elements in ``box``: bounds per dimension of the whole."""
        have = stored.place(part).box
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, have, strict=True)]
        if any(begin >= end for begin, end in common):
            return
        shape = [end - begin for begin, end in have]
        row, first, last = prod(shape[1:]), common[0][0] - have[0][0], common[0][1] - have[0][0]
        values = self._elements(key, part, first * row, last * row).view([last - first, *shape[1:]])
        have[0] = common[0]  # these rows are all that was read
        rows[_within(common, box)] = values[_within(common, have)]

    def _elements(self, key: str, part: StoredSlice, start: int, stop: int) -> Tensor:
        """Elements ``[start, stop)`` of a flattened slice, put together from the files that hold them."""
        found, number = list[Tensor](), bisect_right(part.cuts, start) - 1
        while start < stop:
            begin, end = part.cuts[number : number + 2]
            file = self._file(rank_file(part.ranks[number]))
            found.append(file.read(key, end - begin, start - begin, min(stop, end) - begin))
            start, number = end, number + 1
        return found[0] if len(found) == 1 else torch.cat(found)

    def _parameter(self, name: str) -> StoredParameter:
        if name not in self.parameters:
            raise DataError(f"{self.directory}: no parameter {name}; it was written by a model without it")
        return self.parameters[name]

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            if name not in self._entries:
                raise DataError(f"{self.directory}: the index has no file {name}")
            self._files[name] = TensorFile(self.directory / name, self._entries[name])
            self._open.append(self._files[name])
        elif not self._files[name].is_open:
            self._open.append(self._files[name])
        while len(self._open) > MOST_OPEN:
            self._open.popleft().close()
        return self._files[name]


def _within(inner: list[tuple[int, int]], outer: list[tuple[int, int]]) -> tuple[slice, ...]:
    """A box as an index into a tensor that holds the elements of another."""
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(inner, outer, strict=True))
