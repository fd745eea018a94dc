"""The benchmark of attention runs to its end on any machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from megatron_stable.model.triton_support import INSTALLED

ROOT = Path(__file__).resolve().parents[1]


def test_it_counts_and_times_all_ways() -> None:
    ran = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "attention.py", "--smoke"],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    counted = re.findall(r"\| 64 \| (\w+) \| 69 \| ([\d,]+) \|", ran.stdout)
    moved = {by: float(megabytes.replace(",", "")) for by, megabytes in counted}
    # queries and keys are 2 x 33.6 MB; the causal half of the logits is 1.1 GB, written once and read again at least
    assert moved["kernel"] == 67 and moved["chunks"] > 2 * 1074
    assert len(re.findall(r"^\| .* \| (?:sdpa|math, cap 50|largest logits by chunks) \| \d", ran.stdout, re.M)) == 9
    if INSTALLED:
        of = {name: float(n) for name, n in re.findall(r"^\| ([a-z' ]+) \| ([\d.]+) \| \d \| \d \|$", ran.stdout, re.M)}
        assert 0 < of["sigmoid"] < of["libdevice's tanh"]
