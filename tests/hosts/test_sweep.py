"""A sweep as jobs of a real Slurm: they share its runs, on both machines, and what is there makes one table."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

from megatron_stable.study.table import RATE, read_table
from tests.hosts.launches import BIN, ENVIRONMENT
from tests.hosts.machines import Machines
from tests.study.test_sweep import write_sweep
from tests.training.runs import ROOT

SECONDS = 180.0


def test_jobs_share_a_sweep(two: Machines, cluster: dict[str, str], folder: Path) -> None:
    path = write_sweep(folder, axes={RATE: [1e-2, 3e-2, 1e-1]})
    environment = {**os.environ, **ENVIRONMENT, **cluster}

    def on_first(*command: str) -> str:
        entered = two[0].command(command, ROOT)
        done = subprocess.run(entered, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    program = str(BIN / "megatron-stable")
    options = ("cpus_per_task=2", "timeout_min=10", "slurm_mem=500MB")
    said = on_first(program, "sweep", str(path), "--slurm", "2", *(f"--option={option}" for option in options))
    assert [line.partition(", ")[0].partition(": ")[2] for line in said.splitlines()] == ["part 1/2", "part 2/2"]
    end = time.monotonic() + SECONDS
    while on_first("squeue", "--noheader"):
        assert time.monotonic() < end, on_first("squeue") + logs(folder)
        time.sleep(1)
    on_first(program, "sweep", str(path), "--table")
    rows = read_table(folder / "sweep")
    assert [row["status"] for row in rows] == ["finished"] * 3, logs(folder)
    hosts = {
        json.loads((folder / "sweep" / "runs" / row["name"] / "ranks.json").read_text())["ranks"][0]["host"]
        for row in rows
    }
    assert len(hosts) == 2, "a job on each machine"


def logs(folder: Path) -> str:
    """What jobs wrote."""
    return "\n".join(path.read_text(errors="replace") for path in (folder / "sweep" / "jobs").glob("*_log.*"))
