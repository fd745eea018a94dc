"""A save that takes long: training goes on, the next one waits for it, and no rank waits in a collective."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from megatron_stable.checkpoint import store
from tests.harness.ranks import Ranks
from tests.training.runs import Values, layout, metrics, settings, train

OPENS, PATIENCE = 7, 60.0  # the step at which the disk is fast again; seconds after which it is in any case


def stall(gate: Path, slow_rank: int) -> None:
    """Let the thread that saves wait on a rank, as long as a file is not there, as for a disk."""
    original, rank = os.fsync, int(os.environ["RANK"])

    def fsync(descriptor: int) -> None:
        end = time.monotonic() + PATIENCE
        while threading.current_thread().name == "checkpoint" and rank == slow_rank:
            if gate.exists() or time.monotonic() > end:
                break
            time.sleep(0.01)
        original(descriptor)

    os.fsync = fsync


def train_on_a_slow_disk(values: Values, gate: str, slow_rank: int) -> tuple[int, bool]:
    """On a rank: train while saves stall up to a step; the exit code, and whether they did until then."""
    from megatron_stable.training.checkpoints import Checkpoints

    stalled, due = [False], Checkpoints.due

    def opens(self: Checkpoints, step: int) -> bool:
        wanted = due(self, step)
        if step == OPENS and self.rank == 0:
            stalled[0] = not list(self.root.glob("step_*"))
            Path(gate).touch()
        return wanted

    Checkpoints.due = opens  # type: ignore[method-assign]
    stall(Path(gate), slow_rank)
    return train(values), stalled[0]


@pytest.mark.parametrize("slow_rank", [0, 1])
def test_training_goes_on_and_the_next_save_is_put_off(
    ranks: Ranks, folder: Path, capsys: pytest.CaptureFixture[str], slow_rank: int
) -> None:
    values = settings(folder, steps=12, parallel=layout(tensor=2), checkpoint={"every": 2})
    found = ranks.run(2, train_on_a_slow_disk, values, str(folder / "gate"), slow_rank)
    assert found == [(0, True), (0, False)], "step 7 was trained while the checkpoint of step 2 was being written"
    printed = capsys.readouterr().out
    for step in (4, 6):
        assert f"checkpoint of step 2 is still being written: that of step {step} has to wait" in printed
    assert list(metrics(folder / "run")) == list(range(1, 13))
    entries = store.entries(folder / "run/checkpoints")
    assert [store.damage(entry) for entry in entries] == [None] * len(entries)
    first, second, *_, last = [entry.step for entry in entries]
    assert (first, last) == (2, 12)
    assert second > OPENS, "the one that was put off, not that of step 8 or later alone"


def train_on_a_disk_that_hangs(values: Values, gate: str) -> tuple[int, int]:
    """On a rank: train while a save hangs until training stands still; the exit code, and the step where it stood."""
    run, stood = Path(values["run"]["directory"]), [0]

    def open_when_training_stands() -> None:
        before, since = 0, time.monotonic()
        while time.monotonic() - since < 2.0 or not before:
            time.sleep(0.1)
            done = max(metrics(run), default=0) if (run / "metrics.jsonl").exists() else 0
            if done != before:
                before, since = done, time.monotonic()
        stood[0] = before
        Path(gate).touch()

    if os.environ["RANK"] == "0":
        threading.Thread(target=open_when_training_stands, daemon=True).start()
    stall(Path(gate), 1)
    return train(values), stood[0]


def test_training_waits_for_a_save_that_takes_longer_than_many_intervals(
    ranks: Ranks, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = {"checkpoint": {"every": 2, "max_failed_saves": 3}, "parallel": layout(tensor=2)}
    values = settings(folder, steps=12, **sections)
    assert ranks.run(2, train_on_a_disk_that_hangs, values, str(folder / "gate")) == [(0, 8), (0, 0)]
    assert "checkpoint of step 2 is still being written: training waits for it" in capsys.readouterr().out
    assert [entry.step for entry in store.entries(folder / "run/checkpoints")] == [2, 8, 10, 12]


def wait_for_a_slow_save(folder: str) -> tuple[float, int]:
    """On a rank: how long the wait for a save took, and how many collectives."""
    from datetime import timedelta

    import torch.distributed as dist

    from megatron_stable.checkpoint.health import Retention
    from megatron_stable.checkpoint.saver import Saver
    from megatron_stable.checkpoint.state import Layout
    from megatron_stable.config.schema import Config
    from tests.checkpoint.stored import plain_state, synthetic_states

    gate, rank, timeout = Path(folder) / "gate", dist.get_rank(), 2.0
    stall(gate, 0)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), dist.group.WORLD)
    saver = Saver(Path(folder) / "checkpoints", Retention(1), print)
    saver.save(1, synthetic_states(rank, 2, 1.0), Layout(tensor=2), Config(), plain_state(1))
    if rank == 0:
        threading.Timer(2 * timeout, gate.touch).start()
    began = time.monotonic()
    saver.finish()
    return time.monotonic() - began, saver.failures


def test_waiting_for_a_save_outlives_the_timeout_of_collectives(ranks: Ranks, tmp_path: Path) -> None:
    for seconds, failures in ranks.run(2, wait_for_a_slow_save, str(tmp_path)):
        assert seconds > 3.9
        assert failures == 0
    assert [entry.usable for entry in store.entries(tmp_path / "checkpoints")] == [True]
