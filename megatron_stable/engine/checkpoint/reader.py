"""Read any part of any parameter from a checkpoint, whatever layout wrote it."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_stable.engine.checkpoint.format import Manifest, Piece, require_plain
from megatron_stable.errors import DataError

Slice = tuple[int | None, int, int]  # dim, low, high


class Reader:
    """The tensors of one checkpoint. Nothing is read before it is asked for, and nothing is trusted.

    Raises:
        DataError: A file is missing, damaged, or describes tensors that it does not hold.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.pieces: dict[str, list[tuple[str, Piece]]] = defaultdict(list)  # parameter -> (file, piece)
        self._files: dict[str, Any] = {}
        self._whole: tuple[tuple[str, str], Tensor] | None = None
        for name in manifest.files:
            self._index(name)

    def names(self) -> list[str]:
        """Global names of the stored parameters."""
        return sorted(self.pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a stored parameter."""
        return self._pieces(name)[0][1].shape

    def full(self, name: str, kind: str, shape: tuple[int, ...]) -> Tensor:
        """A whole parameter (``kind`` "weight") or a moment of it, fp32.

        Args:
            shape: What the model expects. Rows of dimension 0 may differ by the padding of the vocabulary: missing
                ones are zeros, surplus ones are dropped.
        """
        if self._whole is not None and self._whole[0] == (name, kind):
            whole = self._whole[1]
        else:
            stored = self.shape(name)
            if stored[1:] != shape[1:]:
                raise DataError(f"{self.directory}: {name} has shape {list(stored)}, the model expects {list(shape)}")
            whole = torch.empty(stored)
            for dim, low, high in self._slices(name):
                part = whole if dim is None else whole.narrow(dim, low, high - low)
                part.copy_(self._flat_slice(name, kind, (dim, low, high)).view(part.shape))
            self._whole = ((name, kind), whole)
        if whole.shape[0] >= shape[0]:
            return whole[: shape[0]]
        return torch.cat([whole, whole.new_zeros(shape[0] - whole.shape[0], *shape[1:])])

    def part(self, name: str, kind: str, wanted: Piece) -> Tensor:
        """The elements that ``wanted`` describes, 1-d fp32."""
        if wanted.shape == self.shape(name) and (wanted.dim, wanted.low, wanted.high) in self._slices(name):
            return self._flat_slice(name, kind, (wanted.dim, wanted.low, wanted.high), wanted.start, wanted.numel)
        whole = self.full(name, kind, wanted.shape)
        local = whole if wanted.dim is None else whole.narrow(wanted.dim, wanted.low, wanted.high - wanted.low)
        return local.flatten()[wanted.start : wanted.start + wanted.numel]

    def _flat_slice(self, name: str, kind: str, part: Slice, start: int = 0, numel: int | None = None) -> Tensor:
        """Elements ``[start, start + numel)`` of a flattened slice, put together from the pieces that hold them."""
        pieces = sorted(
            ((file, piece) for file, piece in self._pieces(name) if (piece.dim, piece.low, piece.high) == part),
            key=lambda item: item[1].start,
        )
        stop = start + (pieces[0][1].slice_numel() - start if numel is None else numel)
        found, position = [], start
        for file, piece in pieces:
            low, high = max(position, piece.start), min(stop, piece.start + piece.numel)
            if low < high and low == position:
                found.append(self._read(file, f"{name}:{kind}", piece, low - piece.start, high - piece.start))
                position = high
        if position != stop:
            raise DataError(f"{self.directory}: {name}:{kind} is incomplete from element {position} on")
        return found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0)

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

    def _slices(self, name: str) -> set[Slice]:
        return {(piece.dim, piece.low, piece.high) for _, piece in self._pieces(name)}

    def _index(self, name: str) -> None:
        path = self.directory / name
        require_plain(path)
        try:
            file = self._files[name] = safe_open(str(path), "pt")
            index = json.loads((file.metadata() or {})["index"])
            for parameter, fields in index.items():
                piece = Piece(
                    tuple(fields["shape"]), *(fields[key] for key in ("dim", "low", "high", "start", "numel"))
                )
                _check(piece)
                known = self.pieces[str(parameter)]
                if known and known[0][1].shape != piece.shape:
                    raise ValueError(f"{parameter} has two shapes")
                known.append((name, piece))
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}: not a rank file of a checkpoint ({type(error).__name__}: {error})") from None


def _check(piece: Piece) -> None:
    numbers = [*piece.shape, piece.low, piece.high, piece.start, piece.numel]
    if not all(type(n) is int and 0 <= n < 2**48 for n in numbers) or not piece.shape:
        raise ValueError("absurd shape")
    if piece.dim is not None and not (
        type(piece.dim) is int
        and 0 <= piece.dim < len(piece.shape)
        and piece.low < piece.high <= piece.shape[piece.dim]
    ):
        raise ValueError("absurd slice")
    if piece.start + piece.numel > piece.slice_numel():
        raise ValueError("absurd piece")
