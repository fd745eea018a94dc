"""Save a checkpoint while training goes on: complete or absent, every rank its own part.

The loop stops only while shards are copied to host memory. A thread per rank then writes the rank's file into a
hidden directory and hands a receipt in at the process group's store; rank 0's thread waits for all receipts, writes
index and manifest, and renames the directory into place. No collective runs off the main thread, and none waits for a
disk: ranks that wait for a save ask rank 0 again and again. A rank that fails says so in its receipt; a rank that dies
takes the run with it, and the next start finds the checkpoints before this one.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_stable.checkpoint import store
from megatron_stable.checkpoint.format import (
    Index,
    Manifest,
    StoredParameter,
    StoredShard,
    directory_name,
    parameters_of,
    rank_file,
    write_contents,
)
from megatron_stable.checkpoint.health import Retention
from megatron_stable.checkpoint.state import Layout, RunState
from megatron_stable.checkpoint.tensors import FileEntry, write_tensors
from megatron_stable.config.schema import Config
from megatron_stable.engine.shards import ShardState
from megatron_stable.errors import MegatronStableError
from megatron_stable.files import sync_directory
from megatron_stable.parallel.agreement import decided, together
from megatron_stable.parallel.world import key_value_store
from megatron_stable.persisted import Persisted
from megatron_stable.stability.events import SaveFailed

TURN = 1.0  # seconds, at most, from one question whether a save has ended to the next


class Receipt(Persisted):
    """A rank's word on its file: the bytes of its tensors, and the file, or why there is none.

    Attributes:
        shards: What it holds, by parameter; ``None``: what it held the last time.
    """

    needed: int
    file: FileEntry | None = None
    shards: dict[str, StoredShard] | None = None
    error: str = ""


class Saver:
    """Writes a run's checkpoints. Collective where it says so.

    Args:
        root: The run's ``checkpoints`` directory, which all ranks share.
        retention: Which checkpoints to keep.
        report: Called on rank 0, from a thread, with a line for the user when a checkpoint is complete or has failed.
        on_failure: Called on rank 0, from the thread of the caller of :meth:`tell`, for each save that failed.

    Attributes:
        shelf: The checkpoints, for rank 0, while no save is in progress.
        failures: Saves in a row that have failed, as of the last :meth:`idle`.
    """

    def __init__(
        self,
        root: Path,
        retention: Retention,
        report: Callable[[str], None],
        on_failure: Callable[[SaveFailed], None] = lambda event: None,
    ) -> None:
        self.root, self.retention, self.report, self.on_failure = root, retention, report, on_failure
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.shelf, self.failures = store.Shelf(root), 0
        self._thread: threading.Thread | None = None
        self._room: dict[str, Tensor] = {}  # for copies; to make it anew each time takes longer than to fill it
        self._told: dict[str, StoredShard] = {}  # to rank 0, what this rank holds
        # on rank 0
        self._held: dict[int, dict[str, StoredShard]] = {}
        self._parameters: dict[str, StoredParameter] | None = None
        self._failed: list[str] = []  # the saves in a row, up to the last
        self._untold: deque[SaveFailed] = deque()

    def save(self, step: int, states: list[ShardState], layout: Layout, config: Config, state: RunState) -> None:
        """Copy the shards' states and start writing. Collective; waits for the last save.

        A save that fails is reported, and leaves nothing behind.
        """
        self.wait()
        beside = self._begin(step)
        if beside is None:
            return
        held = _copy(states, self._room)
        kept = state.model_copy(deep=True)  # training changes what it refers to
        manifest = Manifest(step=step, layout=layout, config=config.model_dump(mode="json"), state=kept)
        self._thread = threading.Thread(target=self._write, args=(beside, manifest, held), name="checkpoint")
        self._thread.start()

    def idle(self) -> bool:
        """Whether the last save has ended on all ranks, well or not. Collective, and short."""
        busy, self.failures = decided(lambda: (self._thread is not None and self._thread.is_alive(), len(self._failed)))
        if not busy and self._thread is not None:  # that of another rank than 0 has handed its receipt in
            self._thread.join()
            self._thread = None
        self.tell()
        return not busy

    def wait(self) -> None:
        """Until the last save has ended on all ranks, well or not. Collective."""
        while not self.idle():
            if self._thread is not None:
                self._thread.join(TURN)

    def finish(self) -> None:
        """Wait for the last save. Collective.

        Raises:
            MegatronStableError: On all ranks alike: it failed.
        """
        self.wait()
        with together():
            if self._failed:
                before = f", like the {len(self._failed) - 1} before it" if len(self._failed) > 1 else ""
                raise MegatronStableError(
                    f"{self._failed[-1]}{before}; make room, and the same command goes on from the last complete "
                    "checkpoint"
                )

    def tell(self) -> None:
        """Call ``on_failure`` for the saves that have failed since; on rank 0."""
        while self._untold:
            self.on_failure(self._untold.popleft())

    def _begin(self, step: int) -> Path | None:
        """Make the hidden directory, on rank 0 alone: one that rank 0 deletes must not come back."""

        def make() -> Path | None:
            beside = self.root / f".{directory_name(step)}.{os.urandom(4).hex()}"
            try:
                beside.mkdir(parents=True)
            except OSError as error:
                self._fail(step, f"{beside.name}: {error.strerror or error}", 0)
                return None
            return beside

        return decided(make)

    def _write(self, beside: Path, manifest: Manifest, held: dict[str, StoredShard]) -> None:
        copies = {f"{name}:{kind}": self._room[f"{name}:{kind}"] for name, each in held.items() for kind in each.kinds}
        needed = sum(tensor.numel() * tensor.element_size() for tensor in copies.values())
        shards = None if held == self._told else held
        try:
            sizes = {key: tensor.numel() for key, tensor in copies.items()}
            file = write_tensors(beside / rank_file(self.rank), sizes, copies.__getitem__)
            receipt = Receipt(needed=needed, file=file, shards=shards)
        except Exception as error:  # a thread must not die silently
            hint = "" if beside.is_dir() else "; run.directory must be on a file system that all ranks share"
            receipt = Receipt(needed=needed, shards=shards, error=f"rank {self.rank}: {error}{hint}")
        self._told = held
        try:
            if self.rank == 0:
                self._complete(beside, manifest, receipt)
            else:
                key_value_store().set(self._key(beside, self.rank), receipt.model_dump_json())
        except dist.DistError:
            return  # the store went down with rank 0, and the run with it

    def _complete(self, beside: Path, manifest: Manifest, mine: Receipt) -> None:
        receipts = [mine, *(self._receipt(beside, rank) for rank in range(1, self.ranks))]
        needed = sum(receipt.needed for receipt in receipts)
        final = self.root / directory_name(manifest.step)
        try:
            news = {rank: receipt.shards for rank, receipt in enumerate(receipts) if receipt.shards is not None}
            if news:  # at the first save; who holds what hardly ever changes
                self._held, self._parameters = self._held | news, None
            if error := next((receipt.error for receipt in receipts if receipt.error), None):
                raise OSError(error)
            if self._parameters is None:
                self._parameters = parameters_of(self._held)
            files = {rank_file(rank): receipt.file for rank, receipt in enumerate(receipts) if receipt.file}
            manifest = write_contents(beside, Index(files=files, parameters=self._parameters), manifest)
            # what has this name is damaged, or of an earlier pass over this step
            replaced = store.retire(final) if final.exists() or final.is_symlink() else None
            beside.rename(final)
            sync_directory(self.root)
        except Exception as error:
            store.remove(beside)  # nobody writes to it any more: all receipts are in
            self._fail(manifest.step, str(error), needed)
            return
        self._failed = []
        self.shelf.put(store.Entry(final, manifest.step, manifest))
        self.report(f"checkpoint of step {manifest.step} complete: {final} ({needed / 1e6:.1f} MB)")
        try:
            if replaced:
                store.remove(replaced)
            store.point_latest(self.root, manifest.step)
            self.shelf.rotate(self.retention)
        except (OSError, MegatronStableError) as error:
            self.report(f"warning: {self.root} cannot be tidied: {error}")

    def _receipt(self, beside: Path, rank: int) -> Receipt:
        keys, key = key_value_store(), self._key(beside, rank)
        while not keys.check([key]):  # get() would hold the store's connection, which the main thread may want
            time.sleep(0.01)
        receipt = Receipt.model_validate_json(keys.get(key))
        keys.delete_key(key)
        return receipt

    @staticmethod
    def _key(beside: Path, rank: int) -> str:
        return f"checkpoint/{beside.name}/{rank}"

    def _fail(self, step: int, error: str, needed: int) -> None:
        failure = f"the checkpoint of step {step} could not be written: {error}"
        try:
            free = shutil.disk_usage(self.root).free
            failure += f" (it needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free in {self.root})"
        except OSError:
            pass
        self._failed = [*self._failed, failure]
        self._untold.append(SaveFailed(step=step, reason=failure, consecutive=len(self._failed)))
        self.report(f"warning: {failure}; training goes on")


def _copy(states: list[ShardState], room: dict[str, Tensor]) -> dict[str, StoredShard]:
    """Copy the owned shards' states to the host, into ``room``, made at the first save; returns what they are."""
    owned = {state.shard.place.name: state for state in states if state.owned}
    for name, state in owned.items():
        for kind, tensor in state.tensors.items():
            key = f"{name}:{kind}"
            if key not in room:
                room[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            room[key].copy_(tensor, non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return {name: StoredShard.of(state.shard, tuple(state.tensors)) for name, state in owned.items()}
