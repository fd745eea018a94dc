"""Save a checkpoint while training goes on: complete or absent, every rank its own part.

The loop stops only while shards are copied to host memory. A thread per rank then writes the rank's file into a
hidden directory and hands a receipt in at the process group's store; rank 0's thread waits for all receipts, writes
the manifest, and renames the directory into place. No collective runs off the main thread. A rank that fails says so
in its receipt; a rank that dies takes the run with it, and the next start finds the checkpoints before this one.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megatron_stable.checkpoint import store
from megatron_stable.checkpoint.format import (
    MANIFEST,
    FileEntry,
    Manifest,
    directory_name,
    file_entry,
    index_of,
    rank_file,
)
from megatron_stable.checkpoint.health import Retention
from megatron_stable.checkpoint.state import Layout, RunState
from megatron_stable.config.schema import Config
from megatron_stable.engine.shards import ShardState
from megatron_stable.errors import MegatronStableError
from megatron_stable.files import replace_file, sync_directory
from megatron_stable.parallel.agreement import decided, together
from megatron_stable.parallel.world import key_value_store
from megatron_stable.persisted import Persisted


class Receipt(Persisted):
    """A rank's word on its file: the bytes of its tensors, and the file, or why there is none."""

    needed: int
    file: FileEntry | None = None
    error: str = ""


class Saver:
    """Writes a run's checkpoints. Collective where it says so.

    Args:
        root: The run's ``checkpoints`` directory, which all ranks share.
        retention: Which checkpoints to keep.
        report: Called on rank 0, from a thread, with a line for the user when a checkpoint is complete or has failed.
    """

    def __init__(self, root: Path, retention: Retention, report: Callable[[str], None]) -> None:
        self.root, self.retention, self.report = root, retention, report
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.failure: str | None = None  # of the last save; rank 0 knows
        self._thread: threading.Thread | None = None

    def save(self, step: int, states: list[ShardState], layout: Layout, config: Config, state: RunState) -> None:
        """Copy the shards' states and start writing. Collective; waits for this rank's last save.

        A save that fails is reported, and leaves nothing behind.
        """
        self.wait()
        beside = self._begin(step)
        if beside is None:
            return
        copies, index = _copies(states)
        kept = state.model_copy(deep=True)  # training changes what it refers to
        manifest = Manifest(step=step, layout=layout, config=config.model_dump(mode="json"), state=kept, files={})
        self._thread = threading.Thread(target=self._write, args=(beside, manifest, copies, index), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until this rank's last save has ended, well or not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Wait for the last save. Collective.

        Raises:
            MegatronStableError: It failed.
        """
        self.wait()
        with together():
            if self.failure:
                raise MegatronStableError(
                    f"{self.failure}; make room, and the same command goes on from the last complete checkpoint"
                )

    def _begin(self, step: int) -> Path | None:
        """Make the hidden directory, on rank 0 alone: one that rank 0 deletes must not come back."""

        def make() -> Path | None:
            beside = self.root / f".{directory_name(step)}.{os.urandom(4).hex()}"
            try:
                beside.mkdir(parents=True)
            except OSError as error:
                self._failed(step, f"{beside.name}: {error.strerror or error}", 0)
                return None
            return beside

        return decided(make)

    def _write(self, beside: Path, manifest: Manifest, copies: dict[str, Tensor], index: str) -> None:
        needed = sum(tensor.numel() * tensor.element_size() for tensor in copies.values())
        try:
            receipt = Receipt(needed=needed, file=self._write_part(beside, copies, index))
        except Exception as error:  # a thread must not die silently
            hint = "" if beside.is_dir() else "; run.directory must be on a file system that all ranks share"
            receipt = Receipt(needed=needed, error=f"rank {self.rank}: {error}{hint}")
        copies.clear()  # the memory is wanted elsewhere
        try:
            if self.rank == 0:
                self._complete(beside, manifest, receipt)
            else:
                key_value_store().set(self._key(beside, self.rank), receipt.model_dump_json())
        except dist.DistError:
            return  # the store went down with rank 0, and the run with it

    def _write_part(self, beside: Path, copies: dict[str, Tensor], index: str) -> FileEntry:
        path = beside / rank_file(self.rank)
        save_file(copies, str(path), metadata={"index": index})
        path.chmod(beside.stat().st_mode & 0o666)  # safetensors makes its files private
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        return file_entry(path)

    def _complete(self, beside: Path, manifest: Manifest, mine: Receipt) -> None:
        receipts = [mine, *(self._receipt(beside, rank) for rank in range(1, self.ranks))]
        needed = sum(receipt.needed for receipt in receipts)
        final = self.root / directory_name(manifest.step)
        try:
            if error := next((receipt.error for receipt in receipts if receipt.error), None):
                raise OSError(error)
            files = {rank_file(rank): receipt.file for rank, receipt in enumerate(receipts)}
            replace_file(beside / MANIFEST, manifest.model_copy(update={"files": files}).dumps().encode())
            # what has this name is damaged, or of an earlier pass over this step
            replaced = store.retire(final) if final.exists() or final.is_symlink() else None
            beside.rename(final)
            sync_directory(self.root)
        except Exception as error:
            store.remove(beside)  # nobody writes to it any more: all receipts are in
            self._failed(manifest.step, str(error), needed)
            return
        self.failure = None
        self.report(f"checkpoint of step {manifest.step} complete: {final} ({needed / 1e6:.1f} MB)")
        try:
            if replaced:
                store.remove(replaced)
            store.point_latest(self.root, manifest.step)
            store.rotate(self.root, self.retention)
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

    def _failed(self, step: int, error: str, needed: int) -> None:
        self.failure = f"the checkpoint of step {step} could not be written: {error}"
        try:
            free = shutil.disk_usage(self.root).free
            self.failure += f" (it needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free in {self.root})"
        except OSError:
            pass
        self.report(f"warning: {self.failure}; training goes on")


def _copies(states: list[ShardState]) -> tuple[dict[str, Tensor], str]:
    """Host copies of the owned shards' states, and the index that says what they are."""
    copies: dict[str, Tensor] = {}
    owned = {state.shard.place.name: state for state in states if state.owned}
    for name, state in owned.items():
        for kind, tensor in state.tensors.items():
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies[f"{name}:{kind}"] = copy.copy_(tensor, non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return copies, index_of({name: state.shard for name, state in owned.items()})
