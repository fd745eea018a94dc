"""Read any part of any parameter from a checkpoint, whatever layout wrote it."""

from __future__ import annotations

import json
from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_stable.checkpoint.format import Manifest, Piece, require_plain
from megatron_stable.errors import DataError

Slice = tuple[int | None, int, int]  # dim, low, high


class Reader:
    """The tensors of one checkpoint. Nothing is read before it is asked for, and nothing is trusted.

    Memory is taken for what the caller wants and for what the files really hold, never for what they claim.

    Raises:
        DataError: A file is missing, damaged, or describes tensors that it does not hold.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.pieces: dict[str, list[tuple[str, Piece]]] = defaultdict(list)  # parameter -> (file, piece)
        self.kinds: dict[str, set[str]] = defaultdict(set)  # parameter -> "weight" and the moments that are stored
        self._files: dict[str, Any] = {}
        for name in manifest.files:
            self._index(name)
        for name, pieces in self.pieces.items():
            pieces.sort(key=lambda item: (item[1].low, item[1].start))
            stored, whole = sum(piece.numel for _, piece in pieces), prod(pieces[0][1].shape)
            if stored != whole:
                raise DataError(f"{directory}: of {name}'s {whole} elements it holds {stored}")

    def names(self) -> list[str]:
        """Global names of the stored parameters."""
        return sorted(self.pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a stored parameter."""
        return self._pieces(name)[0][1].shape

    def full(self, name: str, kind: str, shape: tuple[int, ...]) -> Tensor:
        """A whole parameter (``kind`` "weight") or a moment of it, fp32, of the ``shape`` that the model expects."""
        return self.part(name, kind, Piece(shape, None, 0, 0, 0, prod(shape))).view(shape)

    def part(self, name: str, kind: str, wanted: Piece) -> Tensor:
        """The elements that ``wanted`` describes, 1-d fp32.

        Rows of dimension 0 may differ by the padding of the vocabulary: missing ones are zeros, surplus ones are
        dropped. Only the rows that are needed are read.
        """
        stored = self.shape(name)
        if stored[1:] != wanted.shape[1:]:
            raise DataError(
                f"{self.directory}: {name} has shape {list(stored)}, the model expects {list(wanted.shape)}"
            )
        if not wanted.numel:
            return torch.empty(0)
        shape = wanted.slice_shape()
        row = prod(shape[1:])
        first, last = wanted.start // row, (wanted.start + wanted.numel - 1) // row + 1
        box = _box(wanted)
        box[0] = (box[0][0] + first, box[0][0] + last)
        rows = torch.zeros([high - low for low, high in box])
        for part in self._slices(name):
            self._copy_overlap(name, kind, part, box, rows)
        return rows.flatten()[wanted.start - first * row :][: wanted.numel]

    def _copy_overlap(self, name: str, kind: str, part: Slice, box: list[tuple[int, int]], rows: Tensor) -> None:
        """Fill in what a stored slice has of ``rows``, the elements in ``box``: bounds per dimension of the whole."""
        dim, low, high = part
        have = _box(Piece(self.shape(name), dim, low, high, 0, 0))
        common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, have, strict=True)]
        if any(begin >= end for begin, end in common):
            return
        shape = [end - begin for begin, end in have]
        row, first, last = prod(shape[1:]), common[0][0] - have[0][0], common[0][1] - have[0][0]
        values = self._flat_slice(name, kind, part, first * row, last * row).view([last - first, *shape[1:]])
        have[0] = common[0]  # these rows are all that was read
        rows[_within(common, box)] = values[_within(common, have)]

    def _flat_slice(self, name: str, kind: str, part: Slice, start: int, stop: int) -> Tensor:
        """Elements ``[start, stop)`` of a flattened slice, put together from the pieces that hold them."""
        found, position = [], start
        for file, piece in self._pieces(name):
            low, high = max(position, piece.start), min(stop, piece.start + piece.numel)
            if (piece.dim, piece.low, piece.high) == part and low == position < high:
                found.append(self._read(file, f"{name}:{kind}", piece, low - piece.start, high - piece.start))
                position = high
        if position != stop:
            raise DataError(f"{self.directory}: {name}:{kind} is incomplete from element {position} on")
        return found[0] if len(found) == 1 else torch.cat(found)

    def _read(self, file: str, key: str, piece: Piece, low: int, high: int) -> Tensor:
        try:
            stored = self._files[file].get_slice(key)
            if stored.get_dtype() != "F32" or list(stored.get_shape()) != [piece.numel]:
                raise DataError(f"{self.directory / file}: {key} is not what the index says")
            tensor: Tensor = stored[low:high]
        except SafetensorError as error:
            raise DataError(f"{self.directory / file}: cannot read {key} ({error})") from None
        return tensor

    def _pieces(self, name: str) -> list[tuple[str, Piece]]:
        if name not in self.pieces:
            raise DataError(f"{self.directory}: no parameter {name}; it was written by a model without it")
        return self.pieces[name]

    def _slices(self, name: str) -> list[Slice]:
        return list(dict.fromkeys((piece.dim, piece.low, piece.high) for _, piece in self._pieces(name)))

    def _index(self, name: str) -> None:
        path = self.directory / name
        require_plain(path)
        try:
            file = self._files[name] = safe_open(str(path), "pt")
            index = json.loads((file.metadata() or {})["index"])
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                parameter, _, kind = key.rpartition(":")
                self.kinds[parameter].add(kind)
            for parameter, fields in index.items():
                piece = Piece(
                    tuple(fields["shape"]), *(fields[key] for key in ("dim", "low", "high", "start", "numel"))
                )
                _check(piece)
                if list(file.get_slice(f"{parameter}:weight").get_shape()) != [piece.numel]:
                    raise ValueError(f"{parameter} is not of the size that the index says")
                known = self.pieces[str(parameter)]
                if known and (known[0][1].shape, known[0][1].dim) != (piece.shape, piece.dim):
                    raise ValueError(f"{parameter} has two shapes")
                known.append((name, piece))
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError, OSError) as error:
            raise DataError(f"{path}: not a rank file of a checkpoint ({type(error).__name__}: {error})") from None


def _box(piece: Piece) -> list[tuple[int, int]]:
    """Bounds, per dimension of the whole parameter, of the slice that a piece is of."""
    return [(piece.low, piece.high) if i == piece.dim else (0, n) for i, n in enumerate(piece.shape)]


def _within(inner: list[tuple[int, int]], outer: list[tuple[int, int]]) -> tuple[slice, ...]:
    """A box as an index into a tensor that holds the elements of another."""
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(inner, outer, strict=True))


def _check(piece: Piece) -> None:
    numbers = [*piece.shape, piece.low, piece.high, piece.start, piece.numel]
    if not all(type(n) is int and 0 <= n < 2**48 for n in numbers) or not 1 <= len(piece.shape) <= 8:
        raise ValueError("absurd shape")
    if piece.dim is not None and not (
        type(piece.dim) is int
        and 0 <= piece.dim < len(piece.shape)
        and piece.low < piece.high <= piece.shape[piece.dim]
    ):
        raise ValueError("absurd slice")
    if piece.start + piece.numel > piece.slice_numel():
        raise ValueError("absurd piece")
