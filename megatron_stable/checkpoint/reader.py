"""Read any part of any parameter from a checkpoint, whatever layout wrote it."""

from __future__ import annotations

from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_stable.checkpoint.format import Manifest, read_index
from megatron_stable.errors import DataError
from megatron_stable.parallel.shards import Place, Shard
from megatron_stable.persisted import require_plain


class Reader:
    """The tensors of one checkpoint. Nothing is read before it is asked for, and nothing is trusted.

    Memory is taken for what the caller wants and for what the files really hold, never for what they claim.

    Raises:
        DataError: A file is missing, damaged, or describes tensors that it does not hold.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.shards: dict[str, list[tuple[str, Shard]]] = defaultdict(list)  # parameter -> (file, shard)
        self.kinds: dict[str, set[str]] = defaultdict(set)  # parameter -> "weight" and the moments that are stored
        self._files: dict[str, Any] = {}
        for name in manifest.files:
            self._index(name)
        for name, shards in self.shards.items():
            shards.sort(key=lambda item: (item[1].place.low, item[1].start))
            stored, whole = sum(shard.numel for _, shard in shards), prod(shards[0][1].place.full_shape)
            if stored != whole:
                raise DataError(f"{directory}: of {name}'s {whole} elements it holds {stored}")

    def names(self) -> list[str]:
        """Global names of the stored parameters."""
        return sorted(self.shards)

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a stored parameter."""
        return self._shards(name)[0][1].place.full_shape

    def full(self, name: str, kind: str, shape: tuple[int, ...]) -> Tensor:
        """A whole parameter (``kind`` "weight") or a moment of it, fp32, of the ``shape`` that the model expects."""
        return self.part(kind, Shard(Place(shape, name=name), 0, prod(shape))).view(shape)

    def part(self, kind: str, wanted: Shard) -> Tensor:
        """A shard, whichever that is, of a parameter or a moment of it, 1-d fp32.

        Rows of dimension 0 may differ by the padding of the vocabulary: missing ones are zeros, surplus ones are
        dropped. Only the rows that are needed are read.
        """
        name, expected = wanted.place.name, wanted.place.full_shape
        stored = self.shape(name)
        if stored[1:] != expected[1:]:
            raise DataError(f"{self.directory}: {name} has shape {list(stored)}, the model expects {list(expected)}")
        if not wanted.numel:
            return torch.empty(0)
        row = prod(wanted.place.shape[1:])
        first, last = wanted.start // row, (wanted.start + wanted.numel - 1) // row + 1
        box = wanted.place.box
        box[0] = (box[0][0] + first, box[0][0] + last)
        rows = torch.zeros([high - low for low, high in box])
        for place in dict.fromkeys(shard.place for _, shard in self._shards(name)):
            self._copy_overlap(kind, place, box, rows)
        return rows.flatten()[wanted.start - first * row :][: wanted.numel]

    def _copy_overlap(self, kind: str, place: Place, box: list[tuple[int, int]], rows: Tensor) -> None:
        """Fill in what a stored slice has of ``rows``, the elements in ``box``: bounds per dimension of the whole."""
        have = place.box
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, have, strict=True)]
        if any(begin >= end for begin, end in common):
            return
        shape = [end - begin for begin, end in have]
        row, first, last = prod(shape[1:]), common[0][0] - have[0][0], common[0][1] - have[0][0]
        values = self._flat_slice(kind, place, first * row, last * row).view([last - first, *shape[1:]])
        have[0] = common[0]  # these rows are all that was read
        rows[_within(common, box)] = values[_within(common, have)]

    def _flat_slice(self, kind: str, place: Place, start: int, stop: int) -> Tensor:
        """Elements ``[start, stop)`` of a flattened slice, put together from the shards that hold them."""
        found, position = [], start
        for file, shard in self._shards(place.name):
            low, high = max(position, shard.start), min(stop, shard.start + shard.numel)
            if shard.place == place and low == position < high:
                found.append(self._read(file, kind, shard, low - shard.start, high - shard.start))
                position = high
        if position != stop:
            raise DataError(f"{self.directory}: {place.name}:{kind} is incomplete from element {position} on")
        return found[0] if len(found) == 1 else torch.cat(found)

    def _read(self, file: str, kind: str, shard: Shard, low: int, high: int) -> Tensor:
        key = f"{shard.place.name}:{kind}"
        try:
            stored = self._files[file].get_slice(key)
            if stored.get_dtype() != "F32" or list(stored.get_shape()) != [shard.numel]:
                raise DataError(f"{self.directory / file}: {key} is not what the index says")
            tensor: Tensor = stored[low:high]
        except SafetensorError as error:
            raise DataError(f"{self.directory / file}: cannot read {key} ({error})") from None
        return tensor

    def _shards(self, name: str) -> list[tuple[str, Shard]]:
        if name not in self.shards:
            raise DataError(f"{self.directory}: no parameter {name}; it was written by a model without it")
        return self.shards[name]

    def _index(self, name: str) -> None:
        path = self.directory / name
        require_plain(path)
        try:
            file = self._files[name] = safe_open(str(path), "pt")
            index = read_index((file.metadata() or {})["index"], path)
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                parameter, _, kind = key.rpartition(":")
                self.kinds[parameter].add(kind)
            for parameter, shard in index.items():
                if list(file.get_slice(f"{parameter}:weight").get_shape()) != [shard.numel]:
                    raise ValueError(f"{parameter} is not of the size that the index says")
                known, place = self.shards[parameter], shard.place
                if known and (known[0][1].place.full_shape, known[0][1].place.dim) != (place.full_shape, place.dim):
                    raise ValueError(f"{parameter} has two shapes")
                known.append((name, shard))
        except (SafetensorError, KeyError, ValueError, RecursionError, OSError) as error:
            raise DataError(f"{path}: not a rank file of a checkpoint ({type(error).__name__}: {error})") from None


def _within(inner: list[tuple[int, int]], outer: list[tuple[int, int]]) -> tuple[slice, ...]:
    """A box as an index into a tensor that holds the elements of another."""
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(inner, outer, strict=True))
