"""Choose the newest checkpoint that is whole, and load it into any layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_stable.engine.checkpoint import store
from megatron_stable.engine.checkpoint.format import Manifest, piece_of
from megatron_stable.engine.checkpoint.reader import Reader
from megatron_stable.engine.shards import Shard
from megatron_stable.errors import DataError


def choose(root: Path, report: Callable[[str], None]) -> store.Entry | None:
    """The newest complete checkpoint below ``root`` whose checksums hold, or ``None``. Collective.

    Every rank verifies its share of the files, and all ranks return the same. ``report`` is called on rank 0 with
    what was passed over and why.

    Raises:
        DataError: There are checkpoints, but none that can be used: starting anew would bury them.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found: list[list[store.Entry]] = [store.entries(root) if rank == 0 else []]
    dist.broadcast_object_list(found, src=0)
    for entry in reversed(found[0]):
        problems: list[str | None] = [None] * ranks
        dist.all_gather_object(problems, store.damage(entry, rank, ranks))
        problem = next(filter(None, problems), None)
        if problem is None:
            return entry
        if rank == 0:
            report(f"warning: passed over the checkpoint of step {entry.step}: {problem}")
    if found[0]:
        raise DataError(
            f"{root} holds {len(found[0])} checkpoint(s), none of which can be used (see the warnings above); "
            "restore one from a backup, or choose another run.directory to start anew"
        )
    return None


@torch.no_grad()
def load_shards(directory: Path, manifest: Manifest, shards: list[Shard]) -> None:
    """Fill this rank's shards from a checkpoint that any layout wrote.

    Raises:
        DataError: The checkpoint does not hold what the model needs.
    """
    reader = Reader(directory, manifest)
    for shard in shards:
        wanted = piece_of(shard)
        for kind, tensor in shard.tensors.items():
            tensor.copy_(reader.part(shard.place.name, kind, wanted))
