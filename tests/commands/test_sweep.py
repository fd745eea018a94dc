"""`megatron-stable sweep`: what it says on a terminal, and what it refuses."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path
from shutil import which

import pytest

from megatron_stable.commands.app import run_verb
from megatron_stable.study.table import RATE
from tests.study.test_sweep import write_sweep
from tests.training.runs import ROOT


def test_a_dry_run_says_which_runs_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_sweep(tmp_path, axes={RATE: [1e-2, 3e-2], "run.seed": [1, 2]})
    assert run_verb(["sweep", str(path), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[-1].startswith("4 runs, ") and lines[-1].endswith("; 4 to be trained")
    status, parameters, _, flops, _, name = lines[0].split()
    assert (status, parameters, name) == ("unfinished", "24,736", "learning_rate=0.01,seed=1")
    assert float(flops) == pytest.approx(float(lines[-1].split()[2]) / 4, rel=0.01)
    assert not (tmp_path / "sweep").exists()
    assert run_verb(["sweep", str(path), "--dry-run", "--part", "2/3"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("learning_rate=0.01,seed=2")


def test_what_cannot_be_is_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_sweep(tmp_path, axes={RATE: [1e-2]})
    no_data = write_sweep(tmp_path, "other", axes={"data.train": [str(tmp_path / "no"), str(tmp_path / "none")]})
    for arguments, message in (
        ([path, "--dry-run", "--table"], "--dry-run and --table do not go together"),
        ([path, "--part", "3/2"], "--part 3/2: give I/N"),
        ([path, "--table", "--part", "1/2"], "--part have no effect with --table"),
        ([path, "--commands", 2, "--jobs", 2, "--retries", 0], "--jobs and --retries have no effect with --commands"),
        ([path, "--option", "a=b"], "--option is for --slurm"),
        ([path, "--slurm", 1, "--option", "a"], "write KEY=VALUE"),
        ([path, "--slurm", 1, "--option", "slurm_partitoin=a"], "slurm_partitoin" if which("srun") else "srun"),
        ([tmp_path / "none.yaml"], "no such file"),
        ([no_data], "2 problems"),
    ):
        assert run_verb(["sweep", *map(str, arguments)]) == 2, arguments
        assert message in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists() and not (tmp_path / "other").exists()


def test_a_terminal_shows_runs_in_progress_and_the_time_left(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, axes={RATE: [1e-2, 3e-2], "run.steps": [40]})
    front, back = pty.openpty()
    fcntl.ioctl(back, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
        "TERM": "xterm",
    }
    command = [sys.executable, "-m", "megatron_stable", "sweep", str(path), "--jobs", "1"]
    process = subprocess.Popen(command, env=variables, stdin=back, stdout=back, stderr=back)
    os.close(back)
    said = b""
    try:
        while chunk := _read(front):
            said += chunk
        assert process.wait(timeout=60) == 0
    finally:
        if process.poll() is None:
            process.kill()
        os.close(front)
    text = said.decode()
    assert "2 runs, 1 at a time" in text and "[1/2] learning_rate=0.01,steps=40: finished, loss " in text
    assert "step 0/40" in text and "1/2" in text and " left" in text and "━" in text
    assert text.rstrip().endswith("draws them")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other end is closed
        return b""
