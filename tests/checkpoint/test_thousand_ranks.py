"""1,024 ranks and 100 checkpoints: what is opened, looked at and read, counted."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_stable.checkpoint import store
from megatron_stable.checkpoint.format import (
    Index,
    Manifest,
    StoredShard,
    parameters_of,
    rank_file,
    read_manifest,
    write_contents,
)
from megatron_stable.checkpoint.health import Retention
from megatron_stable.checkpoint.reader import Reader
from megatron_stable.checkpoint.saver import _copy
from megatron_stable.checkpoint.state import Layout
from megatron_stable.checkpoint.tensors import write_tensors
from megatron_stable.config.schema import Config
from tests.checkpoint.stored import COLUMNS, plain_state, synthetic_states

RANKS, CHECKPOINTS, ROWS = 1024, 100, 8

_counting: Counter[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _counting is not None and event in ("open", "os.listdir", "os.scandir"):
        _counting[event] += not isinstance(arguments[0], int)  # a descriptor, which is open already


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """What this process asks of the file system: files opened, looked at, directories listed, bytes read."""
    global _counting
    counts = Counter[str]()
    originals = {name: getattr(os, name) for name in ("stat", "lstat", "fstat")}

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            counts["stat"] += 1
            return original(*arguments, **more)

        return call

    for name, original in originals.items():
        setattr(os, name, counting(original))
    before, _counting = _bytes_read(), counts
    try:
        yield counts
    finally:
        _counting = None
        counts["bytes"] = _bytes_read() - before
        for name, original in originals.items():
            setattr(os, name, original)


def _bytes_read() -> int:
    with Path("/proc/self/io").open() as file:
        return int(file.readline().split()[1])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each rank has 8 rows of a matrix, and rank 0 a vector. Only the newest has the ranks' files: whoever looks at any
    of the others' finds them missing."""
    if not Path("/proc/self/io").exists():
        pytest.skip("counting what is read takes Linux")
    sys.addaudithook(_audit)
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    newest = root / f"step_{CHECKPOINTS:08d}"
    newest.mkdir(parents=True)
    files, held = {}, dict[int, dict[str, StoredShard]]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # it need not outlive the test
        for rank in range(RANKS):
            copies = dict[str, torch.Tensor]()
            held[rank] = _copy(synthetic_states(rank, RANKS, 1.0, ROWS), copies)
            sizes = {key: tensor.numel() for key, tensor in copies.items()}
            files[rank_file(rank)] = write_tensors(newest / rank_file(rank), sizes, copies.__getitem__)
        index = Index(files=files, parameters=parameters_of(held))
        config = Config().model_dump(mode="json")
        for step in range(1, CHECKPOINTS + 1):
            directory = root / f"step_{step:08d}"
            directory.mkdir(exist_ok=True)
            blank = Manifest(step=step, layout=Layout(data=RANKS), config=config, state=plain_state(step))
            write_contents(directory, index, blank)
    return root


def test_a_look_does_not_depend_on_the_ranks(root: Path) -> None:
    with counted() as counts:
        found = store.entries(root)
    assert [entry.usable for entry in found] == [True] * CHECKPOINTS
    assert counts["open"] <= CHECKPOINTS + 4
    assert counts["stat"] <= 4 * CHECKPOINTS + 8
    manifests = sum((entry.directory / "manifest.json").stat().st_size for entry in found)
    assert manifests <= counts["bytes"] < manifests + 2**14
    assert manifests < CHECKPOINTS * 2**14


def test_a_save_looks_at_what_is_new_alone(root: Path) -> None:
    """As the one that writes does it: judge, write, rotate."""
    shelf = store.Shelf(root)
    shelf.judge(now=CHECKPOINTS + 60, bad=[], healthy_after=50)
    with counted() as counts:
        shelf.judge(now=CHECKPOINTS + 61, bad=[], healthy_after=50)
        newest = root / f"step_{CHECKPOINTS:08d}"
        shelf.put(store.Entry(newest, CHECKPOINTS, read_manifest(newest)))
        assert shelf.rotate(Retention(keep=CHECKPOINTS)) == []
    assert counts["open"] <= 4, "the manifest that this test read, and the verdict on the new one"
    assert counts["stat"] <= 16
    assert counts["os.listdir"] + counts["os.scandir"] <= 4


@pytest.mark.parametrize("world", [1024, 512, 4096])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_rank_reads_its_part_and_the_index(root: Path, world: int, place: float) -> None:
    """In the layout that wrote, and in one with half as many ranks or four times as many."""
    rank, newest = round(place * (world - 1)), root / f"step_{CHECKPOINTS:08d}"
    states = synthetic_states(rank, world, 0.0, ROWS * RANKS // world)
    manifest = read_manifest(newest)
    with counted() as counts:
        reader = Reader(newest, manifest)
        for state in states:
            for kind in state.tensors:
                expected = 1.0 + ["weight", "exp_avg", "exp_avg_sq"].index(kind)
                assert reader.part(kind, state.shard).eq(expected).all()
        reader.close()
    files = -(-RANKS // world) + (rank > 0)  # those that hold its rows, and that which holds the vector
    assert counts["open"] == 1 + files
    assert counts["stat"] <= 4 * (1 + files)
    needed = 12 * COLUMNS * (ROWS * RANKS // world + 1)
    # a checksum is for a whole tensor of this size; a header has 1 kB
    whole = 12 * COLUMNS * ROWS * files + 12 * COLUMNS
    assert needed <= counts["bytes"] <= (newest / "index.json").stat().st_size + whole + 1500 * files


def test_the_index_is_small(root: Path) -> None:
    """Beside 350 MB that each of 1,024 ranks holds of 30B parameters: so much per shard, and per rank's file."""
    size = (root / "step_00000001/index.json").stat().st_size
    assert size < RANKS * (100 + 100)
