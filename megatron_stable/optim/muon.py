"""Muon: momentum, orthogonalised matrix by matrix, on full matrices whatever TP and ZeRO are.

Every matrix has one rank of its pipeline stage (DP x TP) that orthogonalises it. Each step, ranks send it their parts
of the momentum and get their parts of the result back::

    segments --all-to-all--> whole matrices, each on one rank --Newton-Schulz--> --all-to-all--> segments
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod, sqrt
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_stable.config.schema import ModelConfig
from megatron_stable.optim.adamw import Flat
from megatron_stable.optim.segments import Partition
from megatron_stable.parallel.parameters import Place

MOMENTS = ("momentum",)
COEFFICIENTS, ITERATIONS, EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7  # Keller Jordan's, as in torch.optim.Muon


def newton_schulz(matrix: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """About U V^T for a matrix U S V^T: singular values are brought to roughly 0.7 .. 1.2, not exactly to 1.

    Args:
        matrix: ``[n, m]``.
        dtype: Precision of the iteration; it magnifies small singular values, and with them the rounding, up to 500 x.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(dtype)
    x = x / x.norm().clamp_min(EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def matrices(name: str, value: Tensor, model: ModelConfig) -> Iterator[Tensor]:
    """The linear maps that a stored parameter holds, as views whose last dimension is the input.

    QKV is three maps, all queries, all keys, all values, which the parameter interleaves group by group; FC1 of swiglu
    is two, gate and up. Each is orthogonalised as a whole, over all its heads: how they are stored together is
    a matter of speed, which the update should not see.
    """
    if name.endswith("attention.qkv.weight"):
        groups = value.view(model.groups, -1, model.head_dim, value.shape[-1])
        yield from groups.split((model.heads // model.groups, 1, 1), dim=1)
    else:
        yield from value.view(-1, *value.shape[-2:])


def orthogonal_update(name: str, momentum: Tensor, model: ModelConfig, dtype: torch.dtype) -> Tensor:
    """0.2 sqrt(max(n, m)) NewtonSchulz(M) for each map ``[n, m]``, whose RMS is that of Adam (arXiv 2502.16982)."""
    update = torch.empty_like(momentum)
    for source, target in zip(matrices(name, momentum, model), matrices(name, update, model), strict=True):
        matrix = source.reshape(-1, source.shape[-1])
        scaled = newton_schulz(matrix, dtype).to(target.dtype) * (0.2 * sqrt(max(matrix.shape)))
        target.copy_(scaled.view(source.shape))
    return update


class Piece(NamedTuple):
    """A rank's part of a parameter: which one, which TP slice, and elements of the flattened slice."""

    parameter: int
    slice: int
    start: int
    numel: int


class Exchange:
    """The way of the matrices in one flat to their owners and back. Collective over the stage: all ranks construct it.

    Args:
        partition: Of the stage.
        flat: The flat; the corresponding one on every rank.
    """

    def __init__(self, partition: Partition, flat: Tensor) -> None:
        self.partition, self.group = partition, partition.group
        within = list(partition.within([flat]))
        self.places: dict[int, Place] = {i: segment.place for i, segment in within}
        own = [Piece(i, s.place.rank, s.start, s.numel) for i, s in within if s.numel]
        self.pieces = [own]
        self.rank = 0
        if self.group is not None:
            self.rank = dist.get_rank(self.group)
            self.pieces *= dist.get_world_size(self.group)
            dist.all_gather_object(self.pieces, own, group=self.group)
        self.owner = _owners(self.places, len(self.pieces))

    def gather(self, flat: Tensor) -> dict[int, Tensor]:
        """The full matrices that this rank owns, from everybody's flats. Collective."""
        sent = [self._part(flat, piece) for rank in range(len(self.pieces)) for piece in self._between(self.rank, rank)]
        received = self._exchange(sent, flat, back=False)
        slices = {
            i: flat.new_empty(place.size, prod(place.full_shape) // place.size)
            for i, place in self.places.items()
            if self.owner[i] == self.rank
        }
        for piece, part in received:
            slices[piece.parameter][piece.slice, piece.start : piece.start + piece.numel] = part
        return {i: _whole(self.places[i], parts) for i, parts in slices.items()}

    def scatter(self, wholes: dict[int, Tensor], flat: Tensor) -> None:
        """Write everybody's parts of the owners' matrices into ``flat``. Collective."""
        slices = {i: _sliced(self.places[i], whole) for i, whole in wholes.items()}
        sent = [
            slices[piece.parameter][piece.slice].view(-1)[piece.start : piece.start + piece.numel]
            for rank in range(len(self.pieces))
            for piece in self._between(rank, self.rank)
        ]
        for piece, part in self._exchange(sent, flat, back=True):
            self._part(flat, piece).copy_(part)

    def _between(self, holder: int, owner: int) -> list[Piece]:
        """The pieces that ``holder`` has of ``owner``'s matrices."""
        return [piece for piece in self.pieces[holder] if self.owner[piece.parameter] == owner]

    def _exchange(self, sent: list[Tensor], like: Tensor, back: bool) -> Iterator[tuple[Piece, Tensor]]:
        """All-to-all of 1-d parts, to the owners or back; yields what arrived here."""
        ranks = range(len(self.pieces))
        there = [self._between(self.rank, rank) for rank in ranks]  # my pieces, by owner
        here = [self._between(rank, self.rank) for rank in ranks]  # pieces of my matrices, by holder
        outgoing, incoming = (here, there) if back else (there, here)
        sizes = [[sum(piece.numel for piece in pieces) for pieces in way] for way in (outgoing, incoming)]
        buffer = torch.cat([like.new_empty(0), *sent])
        if self.group is not None:
            arrived = like.new_empty(sum(sizes[1]))
            dist.all_to_all_single(arrived, buffer, sizes[1], sizes[0], group=self.group)
            buffer = arrived
        pieces = [piece for pieces in incoming for piece in pieces]
        yield from zip(pieces, buffer.split([piece.numel for piece in pieces]), strict=True)

    def _part(self, flat: Tensor, piece: Piece) -> Tensor:
        return self.partition.segments[piece.parameter].of(flat)


def _owners(places: dict[int, Place], ranks: int) -> dict[int, int]:
    """Who orthogonalises what: the costliest matrix first, to the rank with the least to do."""
    load, owner = [0] * ranks, {}
    cost = {i: prod(place.full_shape) * min(place.full_shape[-2:]) for i, place in places.items()}
    for i in sorted(places, key=lambda i: (-cost[i], i)):
        owner[i] = load.index(min(load))
        load[owner[i]] += cost[i]
    return owner


def _whole(place: Place, slices: Tensor) -> Tensor:
    """The full parameter from its flattened TP slices ``[tp, numel/tp]``."""
    if place.dim is None:
        return slices[0].view(place.full_shape)
    shape = [n // place.size if i == place.dim else n for i, n in enumerate(place.full_shape)]
    return torch.cat([part.view(shape) for part in slices], place.dim)


def _sliced(place: Place, whole: Tensor) -> list[Tensor]:
    """The contiguous TP slices of a full parameter."""
    return [whole] if place.dim is None else [part.contiguous() for part in whole.chunk(place.size, place.dim)]


def muon(flats: list[Flat], exchanges: dict[Tensor, Exchange], model: ModelConfig, dtype: torch.dtype) -> None:
    """M <- mu M + (1 - mu) g;  W <- (1 - lr wd) W - lr O(mu M + (1 - mu) g), with O from :func:`orthogonal_update`.

    Nesterov's momentum, as torch.optim.Muon. Collective over the pipeline stage.
    """
    for weight, grad, state, group in flats:
        momentum, decay = state["momentum"], group["momentum"]
        momentum.lerp_(grad, 1 - decay)
        update = grad.lerp_(momentum, decay)
        exchange = exchanges[weight]
        if not exchange.places:  # a group that other stages alone have
            continue
        names = {i: place.name for i, place in exchange.places.items()}
        wholes = exchange.gather(update)
        exchange.scatter({i: orthogonal_update(names[i], whole, model, dtype) for i, whole in wholes.items()}, update)
        weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
