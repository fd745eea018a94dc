"""The counts of kernels run anywhere, and find that compiling joins kernels and moves less."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_compiled_block_starts_fewer_kernels_and_moves_less() -> None:
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "block_counts.py"), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| tiny")]
    assert len(rows) == 2
    for _, tensor, _, eager, compiled, beside, beside_compiled, moved, moved_compiled in rows:
        assert int(eager) - int(beside) >= 14 + (8 if tensor == "2" else 0)  # products, attention; collectives of SP
        assert int(compiled) < int(eager) and 0 < int(beside_compiled) < int(beside)
        assert 0 < int(moved_compiled) < int(moved)
