"""Save a checkpoint while training goes on: complete or absent, every rank its own part.

The loop stops only while shards are copied to host memory. A thread per rank then writes the rank's file into a
hidden directory, with a receipt beside it; rank 0's thread waits for all receipts, writes the manifest, and renames
the directory into place. Threads talk through the (shared) file system only, so no collective runs off the main
thread, and a rank that fails says so in its receipt.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megatron_stable.engine.checkpoint import store
from megatron_stable.engine.checkpoint.format import (
    MANIFEST,
    Manifest,
    directory_name,
    piece_of,
    rank_file,
    sha256,
    sync_directory,
    write_synced,
)
from megatron_stable.engine.shards import Shard

RECEIPT = "receipt_{:05d}.json"


class Saver:
    """Writes a run's checkpoints. Collective where it says so.

    Args:
        root: The run's ``checkpoints`` directory.
        keep: Complete checkpoints to keep.
        report: Called on rank 0 with a line for the user when a checkpoint is complete or has failed.
        patience: Seconds that rank 0 waits for the receipts of the others.
    """

    def __init__(self, root: Path, keep: int, report: Callable[[str], None], patience: float = 1800.0) -> None:
        self.root, self.keep, self.report, self.patience = root, keep, report, patience
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._thread: threading.Thread | None = None

    def save(
        self, step: int, shards: list[Shard], layout: dict[str, Any], config: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """Copy the shards and start writing. Collective; waits for this rank's last save."""
        self.wait()
        attempt = [os.urandom(4).hex()]
        dist.broadcast_object_list(attempt, src=0)
        copies, index = _copies(shards)
        manifest = Manifest(step, layout, config, state, files={})
        beside = self.root / f".{directory_name(step)}.{attempt[0]}"
        self._thread = threading.Thread(target=self._write, args=(beside, manifest, copies, index), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until this rank's last save has ended, well or not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, beside: Path, manifest: Manifest, copies: dict[str, Tensor], index: dict[str, Any]) -> None:
        try:
            receipt = self._write_part(beside, copies, index)
        except Exception as error:  # a thread must not die silently: the receipt carries it to rank 0
            receipt = {"error": f"rank {self.rank}: {_reason(error, beside, copies)}"}
        try:
            write_synced(beside / RECEIPT.format(self.rank), json.dumps(receipt))
        except OSError as error:
            receipt.setdefault("error", f"rank {self.rank}: {error}")
            # no room even for the receipt: a name holds it
            (beside / f"failed_{self.rank:05d}").mkdir(exist_ok=True) if beside.is_dir() else None
        if self.rank == 0:
            try:
                self._complete(beside, manifest)
            except Exception as error:
                shutil.rmtree(beside, ignore_errors=True)
                self.report(f"warning: checkpoint of step {manifest.step} failed, training goes on: {error}")

    def _write_part(self, beside: Path, copies: dict[str, Tensor], index: dict[str, Any]) -> dict[str, Any]:
        beside.mkdir(parents=True, exist_ok=True)
        path = beside / rank_file(self.rank)
        save_file(copies, str(path), metadata={"format": "pt", "index": json.dumps(index)})
        path.chmod(beside.stat().st_mode & 0o666)  # safetensors makes its files private
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": sha256(path)}

    def _complete(self, beside: Path, manifest: Manifest) -> None:
        files = self._receipts(beside)
        for receipt in beside.glob("receipt_*.json"):
            receipt.unlink()
        complete = Manifest(**{**vars(manifest), "files": files})
        write_synced(beside / MANIFEST, complete.dumps())
        final = self.root / directory_name(manifest.step)
        if final.exists():  # of an earlier pass over this step, before a rollback or from a damaged checkpoint
            gone = final.with_name(f".{final.name}.0.deleted")
            shutil.rmtree(gone, ignore_errors=True)
            final.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        beside.rename(final)
        sync_directory(self.root)
        store.point_latest(self.root, final.name)
        store.rotate(self.root, self.keep)
        size = sum(entry["bytes"] for entry in files.values())
        self.report(f"checkpoint of step {manifest.step} complete: {final} ({size / 1e6:.1f} MB)")

    def _receipts(self, beside: Path) -> dict[str, dict[str, Any]]:
        files: dict[str, dict[str, Any]] = {}
        deadline = time.monotonic() + self.patience
        for rank in range(self.ranks):
            path, failed = beside / RECEIPT.format(rank), beside / f"failed_{rank:05d}"
            while not path.exists():
                if failed.exists() or time.monotonic() > deadline:
                    raise OSError(f"rank {rank} could not write its part")
                time.sleep(0.01)
            receipt = json.loads(path.read_text())
            if "error" in receipt:
                raise OSError(receipt["error"])
            files[rank_file(rank)] = receipt
        return files


def _copies(shards: list[Shard]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Host copies of the owned shards, and the index that says what they are."""
    copies: dict[str, Tensor] = {}
    index: dict[str, Any] = {}
    for shard in shards:
        if not shard.owned:
            continue
        name = shard.place.name
        index[name] = asdict(piece_of(shard))
        for kind, tensor in shard.tensors.items():
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies[f"{name}:{kind}"] = copy.copy_(tensor, non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return copies, index


def _reason(error: Exception, beside: Path, copies: dict[str, Tensor]) -> str:
    needed = sum(tensor.numel() * tensor.element_size() for tensor in copies.values())
    try:
        free = shutil.disk_usage(beside.parent).free
        return f"{error} (needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free below {beside.parent})"
    except OSError:
        return str(error)
