"""A process trains run after run without growing: what a run had is let go of at its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

from megatron_stable.study.grid import read_grid
from megatron_stable.study.table import RATE
from tests.study.test_sweep import write_sweep
from tests.training.runs import ROOT


def test_runs_leave_no_threads_and_no_files_behind(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, config_of_runs={"run.steps": 4}, axes={RATE: [1e-3, 1e-2, 2e-2, 3e-2]})
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "megatron_stable.study.worker"]
    pipe = subprocess.PIPE
    worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=variables)
    assert worker.stdin is not None and worker.stdout is not None
    seen, process = [], psutil.Process(worker.pid)
    try:
        for cell in read_grid(path).cells:
            asked = {"ranks": 1, "config": cell.config.model_dump(mode="json")}
            print(json.dumps(asked), file=worker.stdin, flush=True)
            assert json.loads(worker.stdout.readline()) == {"status": "finished", "reason": None}
            seen.append((process.num_threads(), process.num_fds()))
        worker.stdin.close()
        assert worker.wait(30) == 0
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()
    # the first runs import, and begin pools that stay
    assert seen[-1] == seen[-2], seen
    assert all("done: 4 steps" in (cell.directory / "output.log").read_text() for cell in read_grid(path).cells)
