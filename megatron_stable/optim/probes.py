"""What the optimizer measures of weights, gradients, updates and moments, from the shards that this rank updates.

Sums over shards go to a matrix, a row for each statistic, a column for each place that is told apart (layer and linear
layer, whole block, embedding, head). They add up over the ranks; nothing here waits for one, or for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_stable.optim.adamw import Flat
from megatron_stable.optim.partition import LocalShard, Partition
from megatron_stable.parallel.shards import Place
from megatron_stable.stability.probes import LINEARS, OUTSIDE, WEIGHTS

COUNTS = ("numel", "adam")  # elements; of these, those that have Adam's moments
ROWS = (*COUNTS, "weights", "gradients", "under_eps", "updates", "second", "first", "second_under_eps", "surprise")
GROUPS = {
    "weights": ("weights",), "gradients": ("gradients", "under_eps"), "updates": ("updates", "weights"),
    "moments": ("second", "second_under_eps", "surprise"), "noise": ("second", "first"),
}  # fmt: skip
PIECE = 2**24  # elements for which there is another tensor at a time
WRITTEN = {"attention.qkv": "qkv", "attention.proj": "proj", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}


def columns(layers: int) -> list[tuple[str, int | None]]:
    """(point, layer) of each column."""
    return [(point, layer) for layer in range(layers) for point in WEIGHTS] + [(point, None) for point in OUTSIDE]


def columns_of(name: str, layers: int) -> tuple[int | None, int | None]:
    """The columns of a parameter: of its own, if it has one, and that of its block."""
    if name.removesuffix(".weight") in OUTSIDE:
        return layers * len(WEIGHTS) + OUTSIDE.index(name.removesuffix(".weight")), None
    if not name.startswith("blocks."):
        return None, None
    _, layer, rest = name.split(".", 2)
    first = int(layer) * len(WEIGHTS)
    linear = WRITTEN.get(rest.removesuffix(".weight")) if rest.endswith(".weight") else None
    return None if linear is None else first + LINEARS.index(linear), first + WEIGHTS.index("block")


class Moments(NamedTuple):
    """What Adam's moments are corrected with, by a parameter group's betas, after so many updates."""

    first: float
    second: float

    @classmethod
    def of(cls, betas: tuple[float, float], updates: int) -> Moments:
        """1 - beta^t of both."""
        return cls(*(1 - beta**updates for beta in betas))


@dataclass(frozen=True)
class _Measured:
    """The shards of a flat that are measured, and their columns.

    Attributes:
        shards: All that count here; first those with a column of their own.
        own: ``[own]``, columns of the first of them.
        of_block: ``[n]``, columns of their blocks; those outside of blocks add to a last column that nobody reads.
    """

    shards: list[LocalShard]
    own: Tensor
    of_block: Tensor


class ParameterProbes:
    """Measures what this rank's optimizer holds.

    Args:
        partition: Of this rank's stage.
        adam: The flats that have Adam's moments.
        counted: Names of the parameters of which this rank's shard counts; what TP or PP replicates counts once.
        layers: Of the whole model.
        groups: What is measured.

    Attributes:
        sums: fp64 ``[rows, columns + 1]``; NaN where nothing was measured in the step.
    """

    def __init__(
        self,
        partition: Partition,
        adam: Collection[Tensor],
        counted: Collection[str],
        layers: int,
        groups: Collection[str],
    ) -> None:
        self.rows = {row for group in groups for row in GROUPS.get(group, ())}
        device = partition.shards[0].flat.device
        self._beyond = layers * len(WEIGHTS) + len(OUTSIDE)
        self.sums = torch.zeros(len(ROWS), self._beyond + 1, dtype=torch.float64, device=device)
        self._counts = torch.zeros_like(self.sums[: len(COUNTS)])
        self.on = False
        self._of: dict[Tensor, _Measured] = {}
        for flat in {shard.flat for shard in partition.shards}:
            held = [shard for _, shard in partition.within([flat]) if shard.numel and shard.place.name in counted]
            measured = self._of[flat] = self._measured(held, layers, device)
            numel = [shard.numel - _padding(shard) for shard in measured.shards]
            for row in (0, 1) if flat in adam else (0,):
                self._add(self._counts[row], measured, torch.tensor(numel, dtype=torch.float64, device=device))
        self._before: dict[Tensor, Tensor] = {}

    def _measured(self, shards: Iterable[LocalShard], layers: int, device: torch.device) -> _Measured:
        placed = [(shard, *columns_of(shard.place.name, layers)) for shard in shards]
        placed = [each for each in placed if each[1:] != (None, None)]
        placed.sort(key=lambda each: each[1] is None)
        own = [column for _, column, _ in placed if column is not None]
        return _Measured(
            [shard for shard, *_ in placed],
            torch.tensor(own, dtype=torch.long, device=device),
            torch.tensor([self._beyond if b is None else b for *_, b in placed], dtype=torch.long, device=device),
        )

    def begin(self, on: bool) -> None:
        """Before a step that is measured, or is not. What no call of the optimizer sees is not known."""
        self.on, self._seen = on, False
        if on:
            self.sums.fill_(torch.nan)
            self.sums[: len(COUNTS)] = self._counts

    def gradients(self, flats: Sequence[Flat]) -> None:
        """Measure gradients as they come, before clipping, and the weights that they are of."""
        if not self._seen:
            self.sums.zero_()
            self.sums[: len(COUNTS)] = self._counts
            self._seen = True
        for flat in flats:
            self._squares("weights", flat, flat.weight)
            self._squares("gradients", flat, flat.grad)
            if flat.group.get("eps"):
                self._under("under_eps", flat, flat.grad, flat.group["eps"])

    def before(self, flats: Sequence[Flat]) -> None:
        """Remember the weights of an update: a copy of this call's, until :meth:`after`."""
        if "updates" in self.rows:
            self._before = {flat.weight: flat.weight.detach().clone() for flat in flats}

    def after(self, flats: Sequence[Flat], updates: int) -> None:
        """Measure an update that was made, and the moments that it was made with.

        Args:
            updates: That the moments have seen, with this one.
        """
        for flat in flats:
            if "updates" in self.rows:
                self._squares("updates", flat, self._before.pop(flat.weight).sub_(flat.weight.detach()))
            if "exp_avg_sq" in flat.state:
                self._moments(flat, Moments.of(flat.group["betas"], updates))

    def dropped(self) -> None:
        """The update was not made: it is 0, and the moments are as they were."""
        for row in ("second", "first", "second_under_eps", "surprise"):
            self.sums[ROWS.index(row)] = torch.nan

    def _moments(self, flat: Flat, correction: Moments) -> None:
        first, second, eps = flat.state["exp_avg"], flat.state["exp_avg_sq"], flat.group["eps"]
        floor = max(eps**2, torch.finfo(torch.float32).tiny)  # a denormal one may count as 0

        def surprise(shard: LocalShard) -> Tensor:
            pieces = zip(shard.of(flat.grad).split(PIECE), shard.of(second).split(PIECE), strict=True)
            return sum_of(g.square() / (v / correction.second).clamp_min_(floor) for g, v in pieces)

        self._own("second", flat, lambda shard: shard.of(second).sum(dtype=torch.float64) / correction.second)
        self._own("first", flat, lambda shard: (_norm(shard.of(first)) / correction.first).square())
        self._own("surprise", flat, surprise)
        if eps:
            self._under("second_under_eps", flat, second, eps**2 * correction.second)

    def _squares(self, row: str, flat: Flat, tensor: Tensor) -> None:
        """Add sums of squares of a tensor laid out like the flat, to each parameter's column and its block's."""
        measured = self._of.get(flat.weight)  # a stage that lacks a group has a filler for it, which nobody counts
        if measured is not None and row in self.rows and measured.shards:
            norms = torch._foreach_norm([shard.of(tensor) for shard in measured.shards])
            self._add(self.sums[ROWS.index(row)], measured, torch.stack(norms).double().square())

    @staticmethod
    def _add(row: Tensor, measured: _Measured, values: Tensor) -> None:
        row.index_add_(0, measured.own, values[: len(measured.own)])
        row.index_add_(0, measured.of_block, values)

    def _own(self, row: str, flat: Flat, part: Callable[[LocalShard], Tensor]) -> None:
        """Add what ``part`` makes of each shard that has a column of its own."""
        measured = self._of.get(flat.weight)
        if measured is not None and row in self.rows and len(measured.own):
            values = [part(shard) for shard in measured.shards[: len(measured.own)]]
            self.sums[ROWS.index(row)].index_add_(0, measured.own, torch.stack(values).double())

    def _under(self, row: str, flat: Flat, tensor: Tensor, limit: float) -> None:
        """Count elements below a limit, without the padding of the vocabulary, whose elements are all 0."""
        self._own(row, flat, lambda s: sum_of(piece.abs() < limit for piece in s.of(tensor).split(PIECE)) - _padding(s))


def sum_of(pieces: Iterable[Tensor]) -> Tensor:
    """The sum over pieces of a large tensor, which are made one after another; fp64."""
    return torch.stack([piece.sum(dtype=torch.float64) for piece in pieces]).sum()


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64)


def _padding(shard: LocalShard) -> int:
    """How many elements of a shard are rows that pad the vocabulary, which are and stay 0."""
    known: Place = shard.place
    if known.init.rows is None:
        return 0
    row = known.numel // (known.high - known.low) if known.dim == 0 else known.numel // known.full_shape[0]
    edge = max(0, min(known.numel, (known.init.rows - known.low) * row))  # first element of the padding
    return max(0, shard.start + shard.numel - max(shard.start, edge))
