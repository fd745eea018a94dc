"""`megatron-stable status` and `stop` on a run in progress, and when there is none."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_stable.records.presence import Rank, begin_of, write_start
from tests.training.runs import ROOT, curve, finish, layout, pretrain, rank_processes, settings, write_data
from tests.training.test_killed import _wait_for_steps

STEPS = 100_000
HOST = socket.gethostname()


def verb(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_stable", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.mark.parametrize("now", [False, pytest.param(True, marks=pytest.mark.full)], ids=["saved", "now"])
def test_a_run_in_progress(tmp_path: Path, now: bool) -> None:
    write_data(tmp_path / "data")
    run = tmp_path / "run"
    values = settings(tmp_path, "run", STEPS, parallel=layout(tensor=2), checkpoint={"every": STEPS})
    process = pretrain(values)
    try:
        _wait_for_steps(process, run, 3)
        ranks = rank_processes(process.pid)

        said = json.loads(verb("status", run, "--json").stdout)
        assert said["running"] == f"process {ranks[0].pid} on {HOST}"
        assert said["hosts"] == {HOST: [0, 1]}
        assert 3 <= said["step"] < said["steps"] == STEPS
        assert said["seconds_left"] > 0 and said["orphans"] == {}

        stopped = verb("stop", run, *["--now"] * now)
        last = max(curve(run))
        assert stopped.returncode == 0, stopped.stderr
        assert re.search(rf"step {last}: stopped with exit code 0: stopped by \w+ on {HOST}$", stopped.stdout.strip())
        code, output = finish(process, 60)
    finally:
        process.kill()
    assert code == 0, output
    assert (f"stopped after step {last}, " + ("without saving" if now else "saved in ")) in output
    saved = [path.name for path in (run / "checkpoints").glob("step_*")]
    assert saved == ([] if now else [f"step_{last:08d}"])
    assert not (run / "stop.json").exists()

    text = verb("status", run).stdout
    assert text.startswith(f"{run} is not being trained; the command that started it goes on\n")
    assert f"step {last:,} of 100,000 · loss " in text
    assert (f"checkpoint: step {last:,}" if not now else "no checkpoint yet") in text
    again = verb("stop", run)
    assert again.returncode == 2
    assert f"error: {run} is not being trained; `megatron-stable status {run}` says" in again.stderr


def test_ranks_that_live_on_without_rank_0_are_named(tmp_path: Path) -> None:
    orphan = subprocess.Popen([sys.executable, "-c", "input('megatron_stable.pretrain')"], stdin=subprocess.PIPE)
    try:
        (tmp_path / "config.yaml").write_text("{}")
        alive = Rank.myself().model_copy(update={"pid": orphan.pid, "began": begin_of(orphan.pid)})
        gone, reused = (alive.model_copy(update=other) for other in ({"pid": 2**22 + 1}, {"began": 7}))
        elsewhere = alive.model_copy(update={"machine": "another"})
        write_start(tmp_path, [gone, alive, reused, elsewhere], "node1:29500")
        said = verb("status", tmp_path).stdout
        assert f"rank 1 of its last start live on here without rank 0; to end them: kill {orphan.pid}\n" in f"{said}\n"
    finally:
        orphan.kill()


@pytest.mark.parametrize("name", ["status", "stop"])
def test_no_run_at_all(tmp_path: Path, name: str) -> None:
    done = verb(name, tmp_path)
    assert done.returncode == 2
    assert f"error: {tmp_path} is no run's directory" in done.stderr
