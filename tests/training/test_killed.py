"""Kill -9 of one or all ranks at any moment, then the same command again: the curve continues bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.harness.ranks import RankError, Ranks
from tests.training.runs import Values, curve, finish, layout, pretrain, rank_processes, settings, train

STEPS = 24
LAYOUTS = {"tensor": (layout(tensor=2), [[1], [0, 1]]), "pipeline": (layout(pipeline=2), [[0]])}


def run_settings(folder: Path, name: str, parallel: dict[str, Any]) -> Values:
    return settings(folder, name, STEPS, parallel=parallel, checkpoint={"every": 3, "keep": 2})


@pytest.mark.parametrize("name", ["pipeline", pytest.param("tensor", marks=pytest.mark.full)])
def test_killed_processes_resume_bit_for_bit(ranks: Ranks, folder: Path, name: str) -> None:
    parallel, kills = LAYOUTS[name]
    whole = run_settings(folder, "whole", parallel)
    assert ranks.run(2, train, whole) == [0, 0]
    expected = curve(folder / "whole")
    values = run_settings(folder, "run", parallel)
    for victims in kills:
        process = pretrain(values)
        _wait_for_steps(process, folder / "run", 5)
        for rank, child in rank_processes(process.pid).items():
            if rank in victims:
                child.kill()
        killed = time.monotonic()
        code, output = finish(process)
        assert code == 1, output
        assert time.monotonic() - killed < 30
        assert output.splitlines()[-1].startswith("error: a rank was killed by SIGKILL; the same command")
        assert "Traceback" not in output and "frame #" not in output
        assert not rank_processes(process.pid)
        done = max(curve(folder / "run"))
        assert done < STEPS, "it was killed too late for this test"
    assert ranks.run(2, train, values) == [0, 0]
    assert curve(folder / "run") == expected


def _wait_for_steps(process: subprocess.Popen[str], run: Path, more: int) -> None:
    path = run / "metrics.jsonl"
    before = len(path.read_bytes().splitlines()) if path.exists() else 0
    deadline = time.monotonic() + 200
    while not path.exists() or len(path.read_bytes().splitlines()) < before + more:
        assert process.poll() is None and time.monotonic() < deadline, finish(process, 1)[1]
        time.sleep(0.002)


def train_until_killed(values: Values, victims: list[int], step: int, delay: float) -> int:
    """Train; the victims kill themselves ``delay`` seconds after the record of ``step``."""
    if int(os.environ["RANK"]) in victims:
        path = Path(values["run"]["directory"]) / "metrics.jsonl"

        def kill() -> None:
            while not path.exists() or f'"step": {step},' not in path.read_text():
                time.sleep(0.001)
            time.sleep(delay)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()
    return train(values)


@pytest.mark.full
def test_many_kills_at_random_moments_resume_bit_for_bit(ranks: Ranks, folder: Path) -> None:
    chosen = random.Random(0)
    parallel = layout(tensor=2)
    assert ranks.run(2, train, run_settings(folder, "whole", parallel)) == [0, 0]
    values, kills = run_settings(folder, "run", parallel), 0
    for step in (1, 4, 7, 12, 16, 21):
        victims, delay = chosen.choice([[0], [1], [0, 1]]), chosen.uniform(0, 0.05)
        try:
            ranks.run(2, train_until_killed, values, victims, step, delay)
        except RankError as error:
            assert "SIGKILL" in str(error) or "exit code 1" in str(error), error
            kills += 1
    assert kills >= 5
    assert ranks.run(2, train, values) == [0, 0]
    assert curve(folder / "run") == curve(folder / "whole")
