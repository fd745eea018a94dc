"""Parameters of the model to come, each as a way to read it: nothing is in memory before it is written.

An operation makes new ones of old ones, so that operations compose::

    stored ── scaled (a gain folded in) ── copied (a block stacked) ── written

If a weight is multiplied with a factor f so that the function stays, its gradient is divided by f: so are first
moments, and second ones by its square.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from megatron_stable.checkpoint.reader import Reader
from megatron_stable.parallel.shards import Place, Shard

Read: TypeAlias = Callable[[str, int, int], Tensor]  # kind ("weight", a moment), first element, last: 1-d fp32
SQUARED = "exp_avg_sq"


@dataclass(frozen=True)
class Parameter:
    """A parameter to come.

    Attributes:
        shape: Of the whole.
        kinds: "weight", and its moments.
        read: Its elements, of a kind, [low, high) of it flattened.
    """

    shape: tuple[int, ...]
    kinds: tuple[str, ...]
    read: Read

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)


Parameters: TypeAlias = dict[str, Parameter]


def stored(reader: Reader, name: str, shape: tuple[int, ...]) -> Parameter:
    """One that a checkpoint holds; ``shape``: as the model has it, which differs by the padding of the vocabulary."""
    place = Place(shape, name=name)
    kinds = reader.parameters[name].kinds if name in reader.parameters else ("weight",)
    return Parameter(shape, kinds, lambda kind, low, high: reader.part(kind, Shard(place, low, high - low)))


def constant(values: Tensor, kinds: tuple[str, ...]) -> Parameter:
    """A new one. No gradient of it has been seen, so its moments are zero."""
    flat = values.detach().float().flatten()
    return Parameter(
        tuple(values.shape),
        kinds,
        lambda kind, low, high: flat[low:high].clone() if kind == "weight" else torch.zeros(high - low),
    )


def scaled(old: Parameter, rows: Tensor | None = None, columns: Tensor | None = None) -> Parameter:
    """With a factor for each row (all dimensions but the last, of a vector each element), or for each column.

    Where a factor is 0, the gradient says nothing about what it was, and moments are zero.
    """
    width = old.shape[-1] if len(old.shape) > 1 else 1
    by = (rows if rows is not None else columns).flatten().float()  # type: ignore[union-attr]

    def read(kind: str, low: int, high: int) -> Tensor:
        index = torch.arange(low, high)
        factor = by[index // width if rows is not None else index % width]
        if kind != "weight":
            factor = torch.where(factor == 0, 0.0, 1 / factor)
        return old.read(kind, low, high).mul_(factor.square() if kind == SQUARED else factor)

    return replace(old, read=read)


def shifted(old: Parameter, by: Tensor) -> Parameter:
    """A bias and what is added to it; its gradient stays."""
    flat = by.flatten().float()

    def read(kind: str, low: int, high: int) -> Tensor:
        values = old.read(kind, low, high)
        return values + flat[low:high] if kind == "weight" else values

    return replace(old, read=read)


def copied(old: Parameter, silent: bool) -> Parameter:
    """As a block that is stacked has it: ``silent`` if it must write nothing to the residual stream yet.

    The copy gets gradients of its own, so its first moments begin at zero. The second ones stay: they say of which size
    gradients there are, and without them the first steps would be as long as the learning rate allows.
    """

    def read(kind: str, low: int, high: int) -> Tensor:
        gone = kind not in ("weight", SQUARED) or (silent and kind == "weight")
        return torch.zeros(high - low) if gone else old.read(kind, low, high)

    return replace(old, read=read)


def extended(old: Parameter, rows: int, full: int, beyond: Callable[[int], Tensor], known: int) -> Parameter:
    """With further rows, ``[rows, h]``: of the old ones ``known`` count, up to ``full`` rows are new, then zeros.

    Args:
        beyond: The weights of a new row, by its number ``[h]``. No gradient of it has been seen: moments are zero.
    """
    width = old.shape[-1]

    def read(kind: str, low: int, high: int) -> Tensor:
        values, edge = torch.zeros(high - low), known * width
        if low < edge:
            values[: min(high, edge) - low] = old.read(kind, low, min(high, edge))
        if kind == "weight":
            for row in range(max(known, low // width), min(full, -(-high // width))):
                begin, end = max(low, row * width), min(high, (row + 1) * width)
                values[begin - low : end - low] = beyond(row)[begin - row * width : end - row * width]
        return values

    return replace(old, shape=(rows, width), read=read)
