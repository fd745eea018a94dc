"""Which shards of which parameters a rank's optimizer holds, and sums over all shards of a parameter.

DeepSpeed hands the optimizer flat tensors that hold shards of many parameters. Rules that work per parameter see them
through these::

    flat of rank 0   [ embedding .......... | qkv ....... | proj |  pad ]
                       shard                 shard         shard
    flat of rank 1   [ proj ...... | fc1 ................ | fc2 ... pad ]

A parameter that TP shards is whole over the ranks of its pipeline stage (DP x TP), a replicated one over those of DP.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_stable.parallel.shards import Place, Shard


@dataclass(frozen=True)
class LocalShard(Shard):
    """A shard that this rank's optimizer holds.

    Attributes:
        flat: The tensor that holds it, a parameter of the optimizer.
        offset: First element, in ``flat``.
    """

    flat: Tensor
    offset: int

    def described(self) -> Shard:
        """The same without the tensor that holds it: what other ranks can know of it."""
        return Shard(self.place, self.start, self.numel)

    def of(self, tensor: Tensor) -> Tensor:
        """The shard in a tensor laid out like ``flat``: the flat itself, its gradient, a moment. A 1-d view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


class Partition:
    """The parameters of this rank's pipeline stage, and its shard of each.

    Args:
        shards: One for each parameter of the stage, in the same order on all its ranks; empty ones included.
        group: The ranks of the stage (DP x TP); ``None``: this rank alone.
        tensor_rank: This rank's place among the TP ranks.
    """

    def __init__(
        self, shards: Sequence[LocalShard], group: dist.ProcessGroup | None = None, tensor_rank: int = 0
    ) -> None:
        self.shards, self.tensor_rank = list(shards), tensor_rank
        self.group = group if group is not None and dist.get_world_size(group) > 1 else None
        # names of all parameters, and how many elements each has in all
        self.index = {shard.place.name: i for i, shard in enumerate(self.shards)}
        self.numel = [_numel(shard.place) for shard in self.shards]
        self._within: dict[Tensor, list[int]] = defaultdict(list)
        for i, shard in enumerate(self.shards):
            self._within[shard.flat].append(i)

    def within(self, flats: Iterable[Tensor]) -> Iterator[tuple[int, LocalShard]]:
        """The parameters in ``flats``: (number, this rank's shard)."""
        for flat in flats:
            for i in self._within[flat]:
                yield i, self.shards[i]

    def sums(self, flats: Iterable[Tensor], part: Callable[[LocalShard], Tensor]) -> Tensor:
        """Sum over whole parameters, exact on every layout. Collective over the stage: one small reduction.

        Args:
            flats: The flats whose parameters are summed, the corresponding ones on every rank.
            part: The sum over a shard, a scalar; in fp64, so that the order of adding is not seen in fp32.

        Returns:
            fp64 ``[parameters of the stage]``; 0 for parameters in other flats.
        """
        zero = torch.zeros((), dtype=torch.float64, device=self.shards[0].flat.device)
        found = [zero] * len(self.shards)
        for i, shard in self.within(flats):
            if shard.place.dim is not None or self.tensor_rank == 0:  # a replicated parameter counts once
                found[i] = part(shard)
        return self.reduce(torch.stack(found))

    def reduce(self, value: Tensor) -> Tensor:
        """Sum a tensor over the ranks of the stage, in place. Collective."""
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value


def _numel(place: Place) -> int:
    """Elements of a whole parameter, without the padding of the vocabulary, which depends on the layout."""
    if place.init.rows is None:
        return prod(place.full_shape)
    return place.init.rows * prod(place.full_shape[1:])


def row_blocks(part: Tensor, start: int, width: int) -> Iterator[tuple[int, int, Tensor]]:
    """Cut elements ``[start, start + n)`` of a flattened ``[rows, width]`` matrix into rectangles.

    Yields:
        At most three times (first row, first column, view ``[rows, columns]``): a broken row, whole rows, a broken row.
    """
    position, stop = start, start + part.numel()
    while position < stop:
        row, column = divmod(position, width)
        whole = 0 if column else (stop - position) // width
        length = whole * width or min(width - column, stop - position)
        yield row, column, part.narrow(0, position - start, length).view(max(whole, 1), -1)
        position += length
