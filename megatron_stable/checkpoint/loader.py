"""Choose the newest checkpoint that is whole, and load it into any layout: read and verified in one pass, then taken.

Each rank reads what it needs onto the host, and nothing of the model changes until all ranks have all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_stable.checkpoint import store
from megatron_stable.checkpoint.format import Manifest
from megatron_stable.checkpoint.reader import Reader
from megatron_stable.checkpoint.store import Entry, Shelf
from megatron_stable.disk import Damaged, Unreadable
from megatron_stable.engine.shards import ShardState
from megatron_stable.errors import DataError
from megatron_stable.parallel.agreement import decided, together


@dataclass(frozen=True)
class Found:
    """A checkpoint that all ranks have read.

    Attributes:
        parts: What this rank needs of it, on the host and verified: by shard, the tensors by name.
    """

    directory: Path
    step: int
    manifest: Manifest
    parts: list[dict[str, Tensor]]

    @torch.no_grad()
    def fill(self, states: list[ShardState]) -> bool:
        """Make shards, those that were asked for, what the checkpoint says.

        Returns:
            Whether it holds all of their moments; else another optimizer wrote it, and those that it lacks are zero.
        """
        for state, part in zip(states, self.parts, strict=True):
            for kind, tensor in state.tensors.items():
                tensor.copy_(part[kind]) if kind in part else tensor.zero_()
        return all(part.keys() == state.tensors.keys() for state, part in zip(states, self.parts, strict=True))


def any_to_load(root: Path) -> bool:
    """Whether :func:`choose` will find a checkpoint, or end the run; only manifests are read. Collective."""
    return decided(lambda: any(not entry.abandoned for entry in store.entries(root)))


def choose(
    shelf: Shelf, states: list[ShardState], report: Callable[[str], None], check: Callable[[Entry], None] | None = None
) -> Found | None:
    """The newest checkpoint that is not abandoned and whole, read for ``states``; ``None``: there is none. Collective.

    One that a checksum finds damaged, on any rank, is passed over, which ``report`` is told on rank 0, and recorded
    beside it. One that cannot be read is not: it may be the run's last days, so a person decides.

    Args:
        check: Raises a user's error, on all ranks alike, if a checkpoint must not be loaded; called before it is read.

    Raises:
        DataError: On all ranks alike: one cannot be read or does not hold what is wanted; or there are checkpoints, but
            none that can be used: starting anew would bury them.
    """
    found = [entry for entry in decided(shelf.entries) if not entry.abandoned]
    passed_over: list[tuple[Entry, str]] = []
    for entry in reversed(found):
        try:
            taken = read(entry, states, check)
        except Unreadable as error:
            raise _agreed_end(
                f"the checkpoint of step {entry.step} cannot be read, which does not mean that it is damaged: {error}\n"
                "when its file system is well again, the same command goes on from it; to go on from an earlier one, "
                f"move {entry.directory} away"
            ) from None
        except Damaged as error:
            passed_over.append((entry, str(error)))
            if dist.get_rank() == 0:
                report(f"warning: passed over the checkpoint of step {entry.step}: {error}")
            continue
        if dist.get_rank() == 0:
            for damaged, problem in passed_over:
                note_damage(shelf, damaged, problem, report)
        return taken
    if found:
        raise _agreed_end(
            f"{shelf.root} holds {len(found)} checkpoint(s), none of which can be used (see the warnings above); "
            "restore one from a backup, or choose another run.directory to start anew"
        )
    return None


def read(entry: Entry, states: list[ShardState], check: Callable[[Entry], None] | None = None) -> Found:
    """Read what this rank needs of a checkpoint. Collective.

    Raises:
        Damaged, Unreadable, DataError: On all ranks alike: a checksum does not match; it cannot be read; it does not
            hold what the model needs.
    """
    if entry.manifest is None:
        raise _agreed_end(entry.problem or "", Unreadable if entry.unreadable else Damaged)
    parts: list[dict[str, Tensor]] = []
    with together():
        if check is not None:
            check(entry)
        reader = Reader(entry.directory, entry.manifest)
        for state in states:
            known = (
                reader.parameters[state.shard.place.name].kinds if state.shard.place.name in reader.parameters else ()
            )
            wanted = [kind for kind in state.tensors if kind == "weight" or kind in known]
            parts.append({kind: reader.part(kind, state.shard) for kind in wanted})
        reader.close()
    return Found(entry.directory, entry.step, entry.manifest, parts)


def note_damage(shelf: Shelf, entry: Entry, problem: str, report: Callable[[str], None]) -> None:
    """Record on rank 0 what a checksum said, if it was one of the ranks' files; else the manifest says it each time."""
    if entry.manifest is None:
        return
    try:
        shelf.mark_damaged(entry, problem)
    except OSError as error:
        report(f"warning: {entry.directory} cannot be marked as damaged: {error}")


def _agreed_end(text: str, kind: type[DataError] = DataError) -> DataError:
    error = kind(text)
    error.agreed = True
    return error
