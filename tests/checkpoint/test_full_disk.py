"""A full disk fails the save with a warning that says what it needs; training goes on, and saves when there is room."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_stable.checkpoint import store
from megatron_stable.records.ledger import Ledger
from megatron_stable.stability.events import SaveFailed, Stop
from tests.checkpoint.stored import plain_state, synthetic_states
from tests.harness.ranks import Ranks
from tests.training.runs import layout, metrics, settings, train

ROWS = 2000  # of 24 columns, 3 tensors, on each of 2 ranks: 1.15 MB a checkpoint


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(path)], capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root on Linux")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def save_three_times(folder: str, rank_with_room: bool) -> tuple[list[str], list[str], str]:
    """On a rank: save with room, without, and with room again; what was said, what was there then, how it ended."""
    import torch.distributed as dist

    from megatron_stable.checkpoint.health import Retention
    from megatron_stable.checkpoint.saver import Saver
    from megatron_stable.checkpoint.state import Layout
    from megatron_stable.config.schema import Config
    from megatron_stable.errors import MegatronStableError

    said: list[str] = []
    root, fill, rank = Path(folder) / "checkpoints", Path(folder) / "fill", dist.get_rank()
    saver = Saver(root, Retention(2), said.append)

    def save(step: int) -> list[str]:
        saver.save(step, synthetic_states(rank, 2, float(step), ROWS), Layout(), Config(), plain_state(step))
        saver.wait()
        dist.barrier()
        return sorted(path.name for path in root.iterdir())

    save(1)
    if rank == 0:  # leave room for the one rank's part, or for none
        with fill.open("wb") as file:
            file.write(bytes(3 * 2**20 - 1_250_000 - (700_000 if rank_with_room else 20_000)))
    dist.barrier()
    during = save(2)
    ended = ""
    try:
        saver.finish()
    except MegatronStableError as error:
        ended = str(error)
    if rank == 0:
        fill.unlink()
    dist.barrier()
    save(3)
    saver.finish()
    return said, during, ended


@pytest.mark.parametrize("rank_with_room", [True, False])
def test_a_save_without_room_leaves_nothing_and_the_next_one_works(
    ranks: Ranks, disk: Path, rank_with_room: bool
) -> None:
    (said, during, ended), (silent, _, ended_there) = ranks.run(2, save_three_times, str(disk), rank_with_room)
    assert during == ["latest", "step_00000001"]
    assert silent == [] and len(said) == 3
    assert re.match(
        r"warning: the checkpoint of step 2 could not be written: rank \d: .*No space left on device.* "
        r"\(it needs 1\.2 MB, 0\.\d MB are free in .*checkpoints\); training goes on",
        said[1],
    )
    assert "step 2 could not be written" in ended and "make room" in ended
    assert ended_there == ended, "all ranks must know"
    entries = store.entries(disk / "checkpoints")
    assert [(entry.step, store.damage(entry)) for entry in entries] == [(1, None), (3, None)]


def test_training_goes_on_and_the_end_says_that_nothing_was_saved(
    ranks: Ranks, folder: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # room for the metrics, but not for a checkpoint of 0.6 MB
    (disk / "fill").write_bytes(bytes(3 * 2**20 - 400_000))
    values = settings(folder, "disk/run", 6, parallel=layout(tensor=2), checkpoint={"every": 2})
    assert ranks.run(2, train, values) == [1, 1]
    printed = capsys.readouterr().out
    assert printed.count("training goes on") == 3 and printed.count("] error: ") == 1
    assert "[rank 0] error: the checkpoint of step 6 could not be written" in printed and "Traceback" not in printed
    assert list(metrics(disk / "run")) == list(range(1, 7))
    assert not list((disk / "run/checkpoints").iterdir())
    (disk / "fill").unlink()
    assert ranks.run(2, train, values) == [0, 0]
    assert [entry.step for entry in store.entries(disk / "run/checkpoints")] == [2, 4, 6]


def test_saves_that_fail_again_and_again_end_the_run(
    ranks: Ranks, folder: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the last one allowed, which training waits for, so that no step is made that cannot be kept."""
    (disk / "fill").write_bytes(bytes(3 * 2**20 - 400_000))
    values = settings(folder, "disk/run", 20, parallel=layout(tensor=2), checkpoint={"every": 2, "max_failed_saves": 3})
    assert ranks.run(2, train, values) == [1, 1]
    printed = capsys.readouterr().out
    assert "[rank 0] error: the checkpoint of step 6 could not be written" in printed and "Traceback" not in printed
    assert "like the 2 before it" in printed
    assert list(metrics(disk / "run")) == list(range(1, 7))
    events = Ledger(disk / "run/ledger.jsonl").read()
    failed = [event for event in events if isinstance(event, SaveFailed)]
    assert [(event.step, event.consecutive) for event in failed] == [(2, 1), (4, 2), (6, 3)]
    assert "No space left on device" in failed[0].sentence()
    assert isinstance(events[-1], Stop) and (events[-1].step, events[-1].exit_code) == (6, 1)
