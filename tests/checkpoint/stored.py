"""What a checkpoint holds, read back whole; and synthetic shards to save without an engine."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_128_hexdigest

from megatron_stable.checkpoint import store
from megatron_stable.checkpoint.format import digest, read_manifest
from megatron_stable.checkpoint.reader import Reader
from megatron_stable.checkpoint.state import Layout, RunState
from megatron_stable.config.schema import Config
from megatron_stable.data import Course
from megatron_stable.engine.shards import ShardState
from megatron_stable.optim.partition import LocalShard
from megatron_stable.parallel.shards import Place

ROWS, COLUMNS = 64, 24


def contents(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole."""
    reader = Reader(directory, read_manifest(directory))
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    return {f"{n}:{kind}": reader.full(n, kind, reader.shape(n)) for n in reader.names() for kind in kinds}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit; padded rows of the vocabulary, which depend on the layout, aside."""
    return a.keys() == b.keys() and all(
        torch.equal(*(part[key][: min(len(a[key]), len(b[key]))] for part in (a, b))) for key in a
    )


def keep_only(checkpoints: Path, step: int) -> None:
    """Delete the checkpoints of other steps."""
    for entry in store.entries(checkpoints):
        if entry.step != step:
            shutil.rmtree(entry.directory)


def synthetic_states(rank: int, ranks: int, value: float, rows: int = ROWS) -> list[ShardState]:
    """A matrix that TP shards, of which every rank has its rows, and a vector that rank 0 owns; all of ``value``."""
    flat = torch.zeros(1)
    matrix = Place((rows * ranks, COLUMNS), 0, rank * rows, (rank + 1) * rows, name="matrix")
    vector = Place((COLUMNS,), name="vector")

    def tensors(numel: int) -> dict[str, Tensor]:
        return {kind: torch.full((numel,), value + i) for i, kind in enumerate(("weight", "exp_avg", "exp_avg_sq"))}

    return [
        ShardState(LocalShard(matrix, 0, rows * COLUMNS, flat, 0), True, tensors(rows * COLUMNS)),
        ShardState(LocalShard(vector, 0, COLUMNS, flat, 0), rank == 0, tensors(COLUMNS)),
    ]


def plain_state(step: int) -> RunState:
    """Of a run that has nothing to tell but its step."""
    return RunState(optimizer_steps=step, course=Course.begin(1))


def write_checkpoints(folder: str, steps: list[int], keep: int = 9, rows: int = ROWS) -> list[str]:
    """On a rank: save synthetic shards, whose values are the step; returns what was reported."""
    import torch.distributed as dist

    from megatron_stable.checkpoint.health import Retention
    from megatron_stable.checkpoint.saver import Saver

    said: list[str] = []
    saver = Saver(Path(folder), Retention(keep), said.append)
    for step in steps:
        states = synthetic_states(dist.get_rank(), dist.get_world_size(), float(step), rows)
        saver.save(step, states, Layout(tensor=dist.get_world_size()), Config(), plain_state(step))
    saver.wait()
    return said


def choose_step(folder: str) -> tuple[int | None, list[str]]:
    """On a rank: the step that a resume takes, which is what it reads, and what it said."""
    import torch.distributed as dist

    from megatron_stable import disk
    from megatron_stable.checkpoint.loader import choose

    disk.DELAYS = (0.01, 0.01)
    said: list[str] = []
    states = synthetic_states(dist.get_rank(), dist.get_world_size(), 0.0)
    found = choose(store.Shelf(Path(folder)), states, said.append)
    if found is None:
        return None, said
    found.fill(states)
    assert all(state.tensors["weight"].eq(found.step).all() for state in states)
    return found.step, said


def rewrite_manifest(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest as somebody would who knows the format: its own checksum is right again."""
    body = json.loads((directory / "manifest.json").read_text())
    del body["sha256"]
    change(body)
    (directory / "manifest.json").write_text(json.dumps({**body, "sha256": digest(body)}))


def rewrite_index(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The same with an index, of which the manifest has the checksum."""
    index = json.loads((directory / "index.json").read_text())
    change(index)
    data = json.dumps(index).encode()
    (directory / "index.json").write_bytes(data)
    rewrite_manifest(directory, lambda body: body.update(index=hashlib.sha256(data).hexdigest()))


def rewrite_file(directory: Path, name: str, data: bytes) -> None:
    """Replace a file of a checkpoint, and its entry in the index."""
    (directory / name).write_bytes(data)
    header = data[: 8 + int.from_bytes(data[:8], "little")]

    def change(index: dict[str, Any]) -> None:
        index["files"][name] = {"bytes": len(data), "header": xxh3_128_hexdigest(header)}

    rewrite_index(directory, change)
