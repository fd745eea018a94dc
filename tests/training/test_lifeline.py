"""Ranks that wait for something else end within seconds when any rank is lost, without a collective to tell them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.ranks import Ranks
from tests.training.runs import ROOT

CASES = {
    "killed": ([1, 1, -9, 1], ["error: rank 2 was lost; stopping"]),
    "crashes": ([1, 1, 5, 1], []),
    "leaves": ([0, 0, 0, 0], []),
}


@pytest.mark.parametrize("how", CASES)
def test_all_ranks_end(tmp_path: Path, how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.losing", str(tmp_path), how],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "FATAL"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    result = json.loads(done.stdout)
    codes, said = CASES[how]
    assert result["codes"] == codes
    assert result["seconds"] < 30
    assert done.stderr.splitlines() == said


def test_one_rank_tells_why(ranks: Ranks) -> None:
    from megatron_stable.parallel.world import first_to_crash

    assert sorted(ranks.run(3, first_to_crash)) == [False, False, True]
