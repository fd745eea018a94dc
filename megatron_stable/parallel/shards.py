"""Where a part of a parameter lies in the whole: the TP slice, and what somebody holds of it. Numbers; no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Init:
    """How a parameter is drawn.

    Attributes:
        std: Standard deviation; 0 with ``mean`` gives a constant.
        mean: Mean.
        truncated: Cut at two standard deviations (and widen, so that ``std`` is that of the result).
        rows: Draw only this many rows of dimension 0, zeros below: padding of the vocabulary.
        pattern: Runs of rows of dimension 0, as (rows, factor), that repeat: each row is multiplied by its factor.
    """

    std: float = 0.0
    mean: float = 0.0
    truncated: bool = False
    rows: int | None = None
    pattern: tuple[tuple[int, float], ...] = ()


ONES, ZEROS = Init(mean=1.0), Init()


@dataclass(frozen=True)
class Place:
    """Where a TP slice of a parameter lies in the whole.

    Attributes:
        full_shape: The parameter's shape before slicing.
        dim: The dimension sharded over TP, or ``None`` for a replicated parameter.
        low, high: Bounds of the slice along ``dim``; 0 and 0 without one.
        init: How it is drawn.
        name: Global name, the same on every layout; set by :func:`name_parameters`.
    """

    full_shape: tuple[int, ...]
    dim: int | None = None
    low: int = 0
    high: int = 0
    init: Init = ZEROS
    name: str = ""

    @property
    def box(self) -> list[tuple[int, int]]:
        """Bounds of the slice along each dimension of the whole."""
        return [(self.low, self.high) if i == self.dim else (0, n) for i, n in enumerate(self.full_shape)]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the slice."""
        return tuple(high - low for low, high in self.box)

    @property
    def numel(self) -> int:
        """Elements of the slice."""
        return prod(self.shape)

    @property
    def slices(self) -> int:
        """How many slices of this size make the whole."""
        return 1 if self.dim is None else self.full_shape[self.dim] // (self.high - self.low)

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Elements ``[start, stop)`` of the flattened slice as (index in the flattened whole, elements), run by run."""
        dim = self.dim or 0
        inner = prod(self.full_shape[dim + 1 :])
        low, high = self.box[dim]
        run, stride = (high - low) * inner, self.full_shape[dim] * inner
        while start < stop:
            outer, inside = divmod(start, run)
            numel = min(run - inside, stop - start)
            yield outer * stride + low * inner + inside, numel
            start += numel

    def slice(self, full: Tensor) -> Tensor:
        """This slice of a full-size tensor (a view)."""
        return full if self.dim is None else full.narrow(self.dim, self.low, self.high - self.low)


@dataclass(frozen=True)
class Shard:
    """What somebody holds of a parameter: elements ``[start, start + numel)`` of its flattened TP slice, perhaps none.

    Attributes:
        place: Of the slice.
        start: First element, in the flattened slice.
        numel: Elements.
    """

    place: Place
    start: int
    numel: int
