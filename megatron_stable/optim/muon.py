"""Muon: momentum, orthogonalised matrix by matrix, on full matrices whatever TP and ZeRO are.

Every matrix has one rank of its pipeline stage (DP x TP) that orthogonalises it. Each step, ranks send it their parts
of the momentum and get their parts of the result back::

    shards --all-to-all--> whole matrices, each on one rank --Newton-Schulz--> --all-to-all--> shards

They go in rounds, so that a rank holds ``ROUND`` elements of matrices at a time, or one matrix that is larger; some
five copies of these, fp32, are what an exchange takes. Those of a round that have the same shape, transposed or not,
are iterated together: small matrices, one after another, leave a GPU idle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from math import prod, sqrt

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_stable.config.schema import ModelConfig
from megatron_stable.optim.adamw import Flat
from megatron_stable.optim.partition import LocalShard, Partition
from megatron_stable.parallel.shards import Place, Shard

MOMENTS = ("momentum",)
ROUND = 2**25  # elements
COEFFICIENTS, ITERATIONS, EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7  # Keller Jordan's, as in torch.optim.Muon


def newton_schulz(x: Tensor) -> Tensor:
    """About U V^T for each matrix U S V^T: singular values are brought to roughly 0.7 .. 1.2, not exactly to 1.

    Args:
        x: ``[k, n, m]``, k matrices, n <= m being cheaper; overwritten. The iteration is in its precision, and
            magnifies small singular values, and with them the rounding, up to 500 x.
    """
    a, b, c = COEFFICIENTS
    x /= torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min_(EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def matrices(name: str, value: Tensor, model: ModelConfig) -> Iterator[Tensor]:
    """The linear maps that a stored parameter holds, as views whose last dimension is the input.

    QKV is three maps, all queries, all keys, all values, which the parameter interleaves group by group; a gated FC1
    is two, gate and up. Each is orthogonalised as a whole, over all its heads: how they are stored together is
    a matter of speed, which the update should not see.
    """
    if name.endswith("attention.qkv.weight"):
        groups = value.view(model.groups, -1, model.head_dim, value.shape[-1])
        yield from groups.split((model.heads // model.groups, 1, 1), dim=1)
    else:
        yield from value.view(-1, *value.shape[-2:])


def orthogonalize_(wholes: Mapping[str, Tensor], model: ModelConfig, dtype: torch.dtype) -> None:
    """M <- 0.2 sqrt(max(n, m)) NewtonSchulz(M) for each map ``[n, m]``, whose RMS is that of Adam (arXiv 2502.16982).

    Args:
        wholes: By name, momentum of full parameters, contiguous.
        dtype: Precision of the iteration.
    """
    alike: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    for name, whole in wholes.items():
        for view in matrices(name, whole, model):
            rows, columns = view.shape[:-1].numel(), view.shape[-1]
            alike[min(rows, columns), max(rows, columns)].append(view)
    for (short, long), views in alike.items():
        batch = views[0].new_empty(len(views), short, long, dtype=dtype)
        torch._foreach_copy_(_lying(batch, views), views)
        torch._foreach_copy_(views, _lying(newton_schulz(batch), views))
        torch._foreach_mul_(views, 0.2 * sqrt(long))


def _lying(batch: Tensor, views: list[Tensor]) -> list[Tensor]:
    """Each matrix of ``batch [k, n, m]``, n <= m, transposed where the map is, in the shape of its view."""
    return [(m if m.shape[-1] == v.shape[-1] else m.T).view(v.shape) for m, v in zip(batch, views, strict=True)]


def exchanges(partition: Partition, flat: Tensor) -> list[Exchange]:
    """One for each round, in which the matrices of a flat are gathered. Collective over the stage.

    Args:
        partition: Of the stage.
        flat: The flat; the corresponding one on every rank.
    """
    local = {shard.place.name: shard for _, shard in partition.within([flat])}
    own = [shard.described() for shard in local.values() if shard.numel]
    shards = [own]  # by rank
    if partition.group is not None:
        shards *= dist.get_world_size(partition.group)
        dist.all_gather_object(shards, own, group=partition.group)
    rounds = _rounds([shard.place for shard in local.values()], len(shards))
    return [Exchange(partition.group, local, shards, owner) for owner in rounds]


class Exchange:
    """The way of some matrices to their owners and back.

    Args:
        group: The ranks of the stage; ``None``: this rank alone.
        local: This rank's shards, by name.
        shards: By rank.
        owner: Who orthogonalises what, by name.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        local: dict[str, LocalShard],
        shards: list[list[Shard]],
        owner: dict[str, int],
    ) -> None:
        self.group, self.owner = group, owner
        self.local = {name: local[name] for name in owner}
        self.shards = [[shard for shard in held if shard.place.name in owner] for held in shards]
        self.rank = 0 if group is None else dist.get_rank(group)

    def gather(self, flat: Tensor) -> dict[str, Tensor]:
        """The full matrices that this rank owns, by name, from everybody's flats. Collective."""
        sent = [self._part(flat, shard) for rank in range(len(self.shards)) for shard in self._between(self.rank, rank)]
        mine = [shard.place for name, shard in self.local.items() if self.owner[name] == self.rank]
        slices = {place.name: flat.new_empty(place.slices, place.numel) for place in mine}
        for shard, part in self._exchange(sent, flat, back=False):
            _stretch(slices[shard.place.name], shard).copy_(part)
        return {place.name: _whole(place, slices[place.name]) for place in mine}

    def scatter(self, wholes: dict[str, Tensor], flat: Tensor) -> None:
        """Write everybody's parts of the owners' matrices into ``flat``. Collective."""
        slices = {name: _sliced(self.local[name].place, whole) for name, whole in wholes.items()}
        sent = [
            _stretch(slices[shard.place.name], shard)
            for rank in range(len(self.shards))
            for shard in self._between(rank, self.rank)
        ]
        for shard, part in self._exchange(sent, flat, back=True):
            self._part(flat, shard).copy_(part)

    def _between(self, holder: int, owner: int) -> list[Shard]:
        """What ``holder`` has of ``owner``'s matrices."""
        return [shard for shard in self.shards[holder] if self.owner[shard.place.name] == owner]

    def _exchange(self, sent: list[Tensor], like: Tensor, back: bool) -> Iterator[tuple[Shard, Tensor]]:
        """All-to-all of 1-d parts, to the owners or back; yields what arrived here."""
        ranks = range(len(self.shards))
        there = [self._between(self.rank, rank) for rank in ranks]  # my shards, by owner
        here = [self._between(rank, self.rank) for rank in ranks]  # shards of my matrices, by holder
        outgoing, incoming = (here, there) if back else (there, here)
        sizes = [[sum(shard.numel for shard in shards) for shards in way] for way in (outgoing, incoming)]
        buffer = torch.cat([like.new_empty(0), *sent])
        if self.group is not None:
            arrived = like.new_empty(sum(sizes[1]))
            dist.all_to_all_single(arrived, buffer, sizes[1], sizes[0], group=self.group)
            buffer = arrived
        shards = [shard for shards in incoming for shard in shards]
        yield from zip(shards, buffer.split([shard.numel for shard in shards]), strict=True)

    def _part(self, flat: Tensor, shard: Shard) -> Tensor:
        return self.local[shard.place.name].of(flat)


def _rounds(places: list[Place], ranks: int) -> list[dict[str, int]]:
    """Who orthogonalises what, by name, round by round: the largest matrix first, to the rank that holds the least."""
    rounds: list[dict[str, int]] = []
    held = [ROUND] * ranks
    size = {place.name: prod(place.full_shape) for place in places}
    for name in sorted(size, key=lambda name: -size[name]):
        if min(held) and min(held) + size[name] > ROUND:
            rounds.append({})
            held = [0] * ranks
        rounds[-1][name] = held.index(min(held))
        held[rounds[-1][name]] += size[name]
    return rounds


def _stretch(slices: Tensor, shard: Shard) -> Tensor:
    """A shard's elements of its parameter's flattened TP slices ``[tp, numel/tp]``, a view."""
    place = shard.place
    number = 0 if place.dim is None else place.low // (place.high - place.low)
    return slices[number, shard.start : shard.start + shard.numel]


def _whole(place: Place, slices: Tensor) -> Tensor:
    """The full parameter from its flattened TP slices ``[tp, numel/tp]``."""
    parts = slices.view(-1, *place.shape)
    return parts[0] if place.dim is None else torch.cat([*parts], place.dim)


def _sliced(place: Place, whole: Tensor) -> Tensor:
    """The flattened TP slices ``[tp, numel/tp]`` of a full parameter."""
    if place.dim is None:
        return whole.reshape(1, -1)
    return torch.stack([part.reshape(-1) for part in whole.chunk(place.slices, place.dim)])


def muon(flats: list[Flat], rounds: dict[Tensor, list[Exchange]], model: ModelConfig, dtype: torch.dtype) -> None:
    """M <- mu M + (1 - mu) g;  W <- (1 - lr wd) W - lr O(mu M + (1 - mu) g), with O from :func:`orthogonalize_`.

    Nesterov's momentum, as torch.optim.Muon. Collective over the pipeline stage.
    """
    for weight, grad, state, group in flats:
        momentum, decay = state["momentum"], group["momentum"]
        momentum.lerp_(grad, 1 - decay)
        update = grad.lerp_(momentum, decay)
        for exchange in rounds[weight]:
            wholes = exchange.gather(update)
            orthogonalize_(wholes, model, dtype)
            exchange.scatter(wholes, update)
        weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
