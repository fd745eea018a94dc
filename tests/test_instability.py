"""The example that shows an instability runs, on two recipes for a few steps, and says what it found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "instability.py"


@pytest.mark.full
def test_it_prints_a_table_and_draws(tmp_path: Path) -> None:
    figure = tmp_path / "deep" / "figure.png"
    command = [sys.executable, str(EXAMPLE), "--steps", "6", "--learning-rate", "0.1", "--output", str(figure)]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLE.parents[1])}
    done = subprocess.run(
        [*command, "--recipes", "baseline", "qk_norm_cap"],
        env=environment, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line}
    baseline, capped = (rows[name] for name in ("baseline", "qk_norm_cap"))
    assert 1 < float(baseline[1]) < 10 and 1 < float(capped[1]) < 10
    assert float(capped[3]) < float(baseline[3]), "the norm does not hold the logits down"
    assert figure.read_bytes().startswith(b"\x89PNG")
