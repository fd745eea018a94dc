"""The benchmark beside peers runs to its end on any machine: each contender trains in turn; who is absent is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PEERS = Path(__file__).resolve().parents[1] / "benchmarks" / "peers.py"
TINY = ["--layers", "1", "--width", "32", "--heads", "2", "--sequence", "16", "--batch", "2", "--threads", "1"]
ALONE = ["ours", "ours, rotary", "nanoGPT's README"]  # which need no package that we do not


@pytest.mark.timeout(300)
def test_contenders_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    command = [sys.executable, str(PEERS), *TINY, "--rounds", "2", "--steps", "2", "--warmup", "2", "--json", str(path)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    seconds = json.loads(path.read_text(encoding="utf-8"))["seconds"]
    assert list(seconds)[:3] == ALONE
    skipped = [line.partition(":")[0] for line in done.stdout.splitlines() if ": skipped, as " in line]
    assert {*seconds, *skipped} == {*ALONE, "litgpt, Fabric", "Trainer, GPT-2"}
    for turns in seconds.values():
        assert len(turns) == 2
        assert all(wall > 0 and processor > 0 for wall, processor in turns)
    counts = dict(line.split(": ") for line in done.stdout.splitlines() if line.endswith(" parameters"))
    parameters = [int(count.removesuffix(" parameters").replace(",", "")) for count in counts.values()]
    assert len(parameters) == len(seconds)
    assert counts["ours"] == counts["nanoGPT's README"], "not the same model"
    assert not list(tmp_path.glob("tmp*")), "something was left behind"
