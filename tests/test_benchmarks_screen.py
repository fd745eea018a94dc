"""benchmarks/screen.py: the proof of screenings, on real text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.full
@pytest.mark.timeout(4 * 3600)
def test_a_poisoned_source_in_six_is_found_and_no_other_accused(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/screen.py", "--trials", "5", "--output", str(tmp_path / "out")]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--json", str(tmp_path / "found.json")], cwd=ROOT, env=variables, check=True)
    trials = json.loads((tmp_path / "found.json").read_text())
    assert len(trials) == 20
    right = [
        trial["suspects"] == ([trial["victim"]] if trial["victim"] else [])
        for trial in trials
    ]  # fmt: skip
    assert sum(right) >= 19, [trial for trial, good in zip(trials, right, strict=True) if not good]
