"""The verb as a user starts it: alone, on ranks of this machine, under a launcher; its report and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_stable.engine.faults import VARIABLE

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TINY = "run: {directory: run}\nmodel: {recipe: qk_norm, vocab_size: 100}\nbatch: {global_size: 8, micro_size: 1}\n"


def examine(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_stable", "doctor", *arguments]
    return subprocess.run(
        command, cwd=folder, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, timeout=280
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a configuration, whose run has not begun."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def checks(report: dict[str, Any]) -> dict[str, list[str]]:
    """The verdicts of each check."""
    found: dict[str, list[str]] = {}
    for row in report["checks"]:
        found.setdefault(row["check"], []).append(row["verdict"])
    return found


def test_alone(folder: Path) -> None:
    done = examine(folder, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    found = checks(report)
    assert (report["exit_code"], report["ranks"], len(report["machines"])) == (0, 1, 1)
    assert found["numerics"] == ["ok", "ok"]
    expected = {
        "versions",
        "apex",
        "flash-attn",
        "Liger",
        "GPUs",
        "cores",
        "open files",
        "interface",
        "storage",
        "locks",
    }
    assert expected <= {*found}
    assert "[9/9] numerics" in done.stderr
    assert [*folder.iterdir()] == [folder / "tiny.yaml"]


def test_two_ranks_and_a_run(folder: Path) -> None:
    done = examine(folder, "--config", "tiny.yaml", "--ranks", "2", "parallel.tensor=2", "precision.dtype=bf16")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "bf16, TP 2 x PP 1 x DP 1, ZeRO-1: gradients within" in " ".join(done.stdout.split())
    assert any("no contradiction, and it fits 2 ranks" in line for line in lines)
    assert any(line.split()[:2] == ["ok", "all-reduce"] for line in lines)
    assert " on 2 ranks of 1 machine: fit to train" in lines[-1]
    assert not (folder / "run").exists()


def test_what_is_wrong_fails(folder: Path) -> None:
    """Rank 1's gradients, and the directory; both are told at once, with what to do."""
    fault = '[{"kind": "scale_gradient", "data_steps": [1, 1], "rank": 1, "factor": 2}]'
    arguments = ["--config", "tiny.yaml", "--ranks", "2", "--directory", "/sys/kernel/run", "--json"]
    done = examine(folder, *arguments, **{VARIABLE: fault})
    assert done.returncode == 2
    report = json.loads(done.stdout)
    storage, numerics = (row for row in report["checks"] if row["verdict"] == "failure")
    assert storage["text"].startswith("make a folder for /sys/kernel/run: ")
    assert storage["remedy"].startswith("choose a directory")
    assert numerics["text"].startswith("fp32, TP 1 x PP 1 x DP 2, ZeRO-1: the gradient norm is off by ")
    assert numerics["remedy"].startswith("do not train on these ranks")
    for row in (storage, numerics):
        assert f"failure: {row['check']}: {row['text']}" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "none.yaml"], "error: none.yaml: no such file or directory"),
        (["--config", "tiny.yaml", "--ranks", "2", "parallel.tensor=3"], "model.heads 4 is not divisible"),
        (["--config", "tiny.yaml", "run.stepz=3"], "run.stepz"),
    ],
)
def test_a_wrong_command_is_refused(folder: Path, arguments: list[str], message: str) -> None:
    done = examine(folder, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and "Traceback" not in done.stderr


def test_ranks_that_were_not_started_alike_under_torchrun(folder: Path) -> None:
    """As under any launcher: the module by itself; here each rank is told another seed."""
    program = "import os, sys; seed = 'run.seed=' + os.environ['RANK']; "
    program += "sys.argv += ['--local_rank=0', 'run.steps=300', '--json', seed]; "
    program += "from megatron_stable.doctor.__main__ import main; sys.exit(main())"
    (folder / "rank.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "rank.py"]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert "error: the ranks were not started alike:\n  rank 1 on" in done.stderr
    assert "run.seed is 1 there and 0 on rank 0" in done.stderr


def test_a_rank_that_is_killed_ends_the_round(folder: Path) -> None:
    command = [sys.executable, "-m", "megatron_stable", "doctor", "--ranks", "2"]
    process = subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("[8/9]"):
            break
    ranks = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "megatron_stable.doctor" in child.cmdline() and child.environ().get("RANK") == "1"
    ]
    start = time.monotonic()
    ranks[0].kill()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert time.monotonic() - start < 30
    assert "rank 1 on" in told and "was lost" in told
