"""What a checkpoint weighs, and how loading scales with the number of ranks that wrote it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from megatron_stable.checkpoint.format import Index, Manifest, parameters_of, rank_file, read_manifest, write_contents
from megatron_stable.checkpoint.reader import Reader
from megatron_stable.checkpoint.saver import _copy
from megatron_stable.checkpoint.state import Layout
from megatron_stable.checkpoint.tensors import TensorFile, write_tensors
from tests.checkpoint.stored import COLUMNS, plain_state, synthetic_states
from tests.harness.ranks import Ranks
from tests.training.runs import layout, settings, train


def test_ten_million_parameters_weigh_their_tensors(ranks: Ranks, folder: Path) -> None:
    """Masters and two moments in fp32, under ZeRO-1, which pads its partitions."""
    values = settings(
        folder,
        steps=1,
        schedule={"kind": "constant", "warmup_steps": 0},
        model={"layers": 12, "hidden": 256, "heads": 4, "vocab_size": 2048},
        parallel=layout(),
        batch={"global_size": 2},
    )
    assert ranks.run(2, train, values) == [0, 0]
    directory = folder / "run/checkpoints/step_00000001"
    reader = Reader(directory, read_manifest(directory))
    parameters = sum(torch.Size(reader.shape(name)).numel() for name in reader.names())
    assert 1.0e7 < parameters < 1.2e7
    size = sum(path.stat().st_size for path in directory.iterdir())
    assert 1.0 <= size / (12 * parameters) < 1.01


def written_by(ranks: int, folder: Path, rows: int) -> Reader:
    """The same matrix and vector, written by ``ranks`` ranks."""
    folder.mkdir()
    files, held = {}, {}
    for rank in range(ranks):
        copies = dict[str, torch.Tensor]()
        held[rank] = _copy(synthetic_states(rank, ranks, 1.0, rows // ranks), copies)
        sizes = {key: tensor.numel() for key, tensor in copies.items()}
        files[rank_file(rank)] = write_tensors(folder / rank_file(rank), sizes, copies.__getitem__)
    manifest = Manifest(step=1, layout=Layout(tensor=ranks), config={}, state=plain_state(1))
    write_contents(folder, Index(files=files, parameters=parameters_of(held)), manifest)
    return Reader(folder, read_manifest(folder))


def test_a_part_is_read_from_the_pieces_that_hold_it_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a rank reads its share of the bytes, however many ranks wrote them."""
    rows = 64 * 20
    read: list[int] = []
    original = TensorFile.read

    def counted(self: TensorFile, key: str, numel: int, low: int, high: int) -> torch.Tensor:
        read.append(high - low)
        return original(self, key, numel, low, high)

    monkeypatch.setattr(TensorFile, "read", counted)
    for writers in (1, 2, 64):
        reader = written_by(writers, tmp_path / str(writers), rows)
        wanted = synthetic_states(1, 4, 0.0, rows // 4)[0].shard
        read.clear()
        assert reader.part("weight", wanted).eq(1.0).all()
        assert sum(read) == rows // 4 * COLUMNS
        assert len(read) == max(1, writers // 4)


def test_loading_time_does_not_grow_with_the_ranks_that_wrote(tmp_path: Path) -> None:
    """16 MB in 64 files against one; generous, as this machine may be busy."""
    rows = 64 * 2700
    seconds = {}
    for writers in (1, 64):
        folder = tmp_path / str(writers)
        written_by(writers, folder, rows)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            reader = Reader(folder, read_manifest(folder))
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                assert reader.full("matrix", kind, (rows, COLUMNS)).shape == (rows, COLUMNS)
            times.append(time.perf_counter() - began)
        seconds[writers] = min(times)
    assert seconds[64] < 3 * seconds[1] + 0.3, seconds
