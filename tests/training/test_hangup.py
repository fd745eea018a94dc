"""A run whose front end, launcher or terminal is gone saves and ends within seconds, unless it was told to go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_stable.training import stop
from tests.training.runs import ROOT, curve, free_port, layout, pretrain, rank_processes, settings
from tests.training.test_killed import _wait_for_steps

STEPS = 100_000
SECONDS = 20.0  # a look each second, a step, a save, and how Python ends


def front_end(process: subprocess.Popen[str]) -> None:
    process.kill()


def launcher(process: subprocess.Popen[str]) -> None:
    psutil.Process(process.pid).children()[0].kill()


def terminal(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGHUP)


def start(folder: Path, **run: Any) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A run that trains, and its ranks."""
    values = settings(folder, "run", STEPS, parallel=layout(tensor=2), checkpoint={"every": STEPS})
    values["run"] |= run
    process = pretrain(values)
    _wait_for_steps(process, folder / "run", 3)
    return process, [*rank_processes(process.pid).values()]


def close(process: subprocess.Popen[str]) -> None:
    """Nobody reads what it prints any more."""
    assert process.stdout is not None
    process.stdout.close()
    process.wait(SECONDS)


@pytest.mark.parametrize(
    "end", [front_end, pytest.param(launcher, marks=pytest.mark.full), pytest.param(terminal, marks=pytest.mark.full)]
)
def test_a_run_that_is_left_alone_saves_and_ends(folder: Path, end: Callable[[Any], None]) -> None:
    process, ranks = start(folder)
    end(process)
    try:
        close(process)
        assert not psutil.wait_procs(ranks, SECONDS)[1]
    finally:
        for rank in ranks:
            if rank.is_running():
                rank.kill()
    stopped = max(curve(folder / "run"))
    assert 3 <= stopped < STEPS
    assert [path.name for path in (folder / "run/checkpoints").glob("step_*")] == [f"step_{stopped:08d}"]
    last = json.loads((folder / "run/ledger.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["step"], last["exit_code"]) == ("stop", stopped, int(end is not terminal))
    assert ("SIGHUP" if end is terminal else "which started it, has ended") in last["reason"]


@pytest.mark.full
def test_a_run_that_is_told_to_goes_on(folder: Path) -> None:
    process, ranks = start(folder, on_hangup="continue")
    try:
        terminal(process)
        front_end(process)
        close(process)
        time.sleep(3 * stop.EVERY)
        before = max(curve(folder / "run"))
        deadline = time.monotonic() + 60
        while max(curve(folder / "run")) < before + 5:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert all(rank.is_running() for rank in ranks)
    finally:
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
    assert not psutil.wait_procs(ranks, SECONDS)[1]


@pytest.mark.full
def test_under_torchrun_whose_store_goes_down_with_it(folder: Path) -> None:
    values = settings(folder, "run", STEPS, parallel=layout(tensor=2), checkpoint={"every": STEPS})
    (folder / "run.yaml").write_text(json.dumps(values))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
        "-m", "megatron_stable.pretrain", "--config", str(folder / "run.yaml"),
    ]  # fmt: skip
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    _wait_for_steps(process, folder / "run", 3)
    ranks = [*rank_processes(process.pid).values()]
    assert len(ranks) == 2
    process.kill()
    close(process)
    assert not psutil.wait_procs(ranks, SECONDS)[1]
    stopped = max(curve(folder / "run"))
    assert [path.name for path in (folder / "run/checkpoints").glob("step_*")] == [f"step_{stopped:08d}"]


WATCHER = """
import os, sys, time
from megatron_stable.training import hangup, stop
print(*(process.pid for process in hangup.Starters()._watched), flush=True)
"""


def starters_of(arguments: list[str], **environment: str) -> list[int]:
    """Of a process that such a command starts."""
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})
    return [int(pid) for pid in done.stdout.split()]


def test_who_started_a_process() -> None:
    """Ancestors of its session, without shells."""
    here, watcher = os.getpid(), [sys.executable, "-c", WATCHER]
    assert starters_of(watcher)[:1] == [here]
    nested = ["sh", "-c", 'true; "$@"; true', "sh", *watcher]
    assert starters_of(nested)[:1] == [here], "the shell between is none"
    apart = [sys.executable, "-c", "import os, subprocess, sys; os.setsid(); subprocess.run(sys.argv[1:])", *watcher]
    (launcher,) = starters_of(apart)
    assert launcher != here
    torchruns = [sys.executable, "-c", "import os, sys; os.setsid(); os.execv(sys.argv[1], sys.argv[1:])", *watcher]
    assert starters_of(torchruns) == [], "who takes a session of its own wants to live on"
    assert starters_of(torchruns, RANK="0", WORLD_SIZE="1")[:1] == [here], "but for ranks of a launcher"


def test_streams_that_nobody_reads_are_dropped(tmp_path: Path) -> None:
    code = (
        "import sys, time; from megatron_stable.training.hangup import drop_dead_streams; sys.stdin.readline(); "
        "drop_dead_streams(); print('out', flush=True); print('err', file=sys.stderr, flush=True)"
    )
    kept = tmp_path / "stderr"
    with kept.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file
        )
        assert process.stdout is not None and process.stdin is not None
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.wait(60) == 0
    assert kept.read_text() == "err\n"
