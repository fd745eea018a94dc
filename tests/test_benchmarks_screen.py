"""benchmarks/screen.py: the proof of screenings, on real text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_stable.study.suspects import APART, FAR

ROOT = Path(__file__).parents[1]


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_poisoned_source_in_six_is_found_and_no_other_accused(tmp_path: Path) -> None:
    """A trial of each kind, minutes; docs/screening.md has more, by the same command."""
    out, told = tmp_path / "out", tmp_path / "found.json"
    command = [sys.executable, "benchmarks/screen.py", "--lr", "0.06", "--trials", "1", "--first", "201"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--output", str(out), "--json", str(told)], cwd=ROOT, env=variables, check=True)
    trials = json.loads(told.read_text())
    assert [trial["kind"] for trial in trials] == ["repeated", "random", "utf8", "none"]
    for trial in trials:
        assert trial["suspects"] == ([trial["victim"]] if trial["victim"] else []), trial
        windows = np.load(out / f"{trial['kind']}-201" / "windows.npz")
        odd = (windows["steps"] > FAR) | (np.abs(windows["losses"]) > APART)
        assert odd.reshape(6, 128).mean(1) == pytest.approx(list(trial["shares"].values()))
