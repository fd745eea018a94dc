"""Choose the newest checkpoint that is whole, and load it into any layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_stable.checkpoint import store
from megatron_stable.checkpoint.format import Manifest
from megatron_stable.checkpoint.reader import Reader
from megatron_stable.engine.shards import ShardState
from megatron_stable.errors import DataError
from megatron_stable.parallel.agreement import decided, together


def choose(root: Path, report: Callable[[str], None], at_most: int | None = None) -> store.Entry | None:
    """The newest complete checkpoint below ``root`` whose checksums hold, or ``None``. Collective.

    Abandoned ones and those of steps after ``at_most`` are not looked at. Every rank verifies its share of the files,
    and all ranks return the same. ``report`` is called on rank 0 with what was passed over and why, which is also
    recorded beside it.

    Raises:
        DataError: On all ranks: there are checkpoints, but none that can be used: starting anew would bury them.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    line = decided(lambda: [entry for entry in store.entries(root) if not entry.abandoned])
    found = [entry for entry in line if at_most is None or entry.step <= at_most]
    passed_over: list[tuple[store.Entry, str]] = []
    for entry in reversed(found):
        problems: list[str | None] = [None] * ranks
        dist.all_gather_object(problems, store.damage(entry, rank, ranks))
        problem = next(filter(None, problems), None)
        if problem is None:
            if rank == 0:
                _mark(passed_over, report)
            return entry
        passed_over.append((entry, problem))
        if rank == 0:
            report(f"warning: passed over the checkpoint of step {entry.step}: {problem}")
    with together():
        if found and at_most is None:
            raise DataError(
                f"{root} holds {len(found)} checkpoint(s), none of which can be used (see the warnings above); "
                "restore one from a backup, or choose another run.directory to start anew"
            )
    return None


def _mark(passed_over: list[tuple[store.Entry, str]], report: Callable[[str], None]) -> None:
    for entry, problem in passed_over:
        try:
            store.mark_damaged(entry, problem)
        except OSError as error:
            report(f"warning: {entry.directory} cannot be marked as damaged: {error}")


@torch.no_grad()
def load_shards(directory: Path, manifest: Manifest, states: list[ShardState]) -> list[ShardState]:
    """Fill this rank's shards from a checkpoint that any layout wrote.

    Returns:
        Those of shards with moments that it does not hold, as another optimizer wrote it; these moments are zero.

    Raises:
        DataError: The checkpoint does not hold what the model needs.
    """
    reader = Reader(directory, manifest)
    incomplete = []
    for state in states:
        missing = state.tensors.keys() - reader.kinds[state.shard.place.name] - {"weight"}
        for kind, tensor in state.tensors.items():
            tensor.zero_() if kind in missing else tensor.copy_(reader.part(kind, state.shard))
        if missing:
            incomplete.append(state)
    return incomplete
