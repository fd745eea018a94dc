"""Kill -9 at random moments of asynchronous saves on several ranks: what is found is whole, and never older."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.training.runs import ROOT

TRIALS = 60


def test_a_kill_at_any_moment_leaves_whole_checkpoints_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.checkpoint.killing", str(tmp_path), str(TRIALS), "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "FATAL"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == TRIALS
    newest = 0
    for trial in found:
        assert not trial["damaged"] and not trial["wrong"] and not trial["left"], trial
        assert max(trial["steps"], default=0) >= newest, (trial, newest)
        newest = max(trial["steps"], default=0)
    assert newest > TRIALS / 4, "hardly any save was completed"
    interrupted = sum(any(name.startswith(".step") for name in trial["names"]) for trial in found)
    assert interrupted > TRIALS / 4, "hardly any save was interrupted"
