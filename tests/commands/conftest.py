"""A run for the verbs that use one: the demo, made very small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from filelock import FileLock

from megatron_stable.data.standard_library import write_standard_library

SMALL = (
    "model.layers=2",
    "model.hidden=64",
    "model.sequence_length=64",
    "model.vocab_size=400",
    "batch.global_size=8",
    "optimizer.learning_rate=4.0e-3",
    "schedule.warmup_steps=2",
    "run.steps=12",
    "evaluation.every=4",
    "evaluation.batches=2",
)


class SmallDemo(NamedTuple):
    """Where a demo is, what it said, and with what exit code it ended."""

    directory: Path
    said: str
    code: int

    @property
    def run(self) -> Path:
        """The directory of its second run, the one that trains through."""
        return self.directory / "qk_norm_cap"


def small_demo(directory: Path, *arguments: str) -> SmallDemo:
    """A demo of seconds, on two real ranks."""
    text = directory / "text.jsonl"
    if not text.exists():
        write_standard_library(text, most_bytes=1_500_000)
    command = [sys.executable, "-m", "megatron_stable", "demo", "--directory", str(directory), *arguments]
    ended = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False
    )
    return SmallDemo(directory, ended.stdout, ended.returncode)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> SmallDemo:
    """A finished demo. Tests leave it as it is; the processes of a test run share it."""
    base = tmp_path_factory.getbasetemp()
    directory = (base if worker_id == "master" else base.parent) / "small-demo"
    said = directory.with_suffix(".txt")
    with FileLock(f"{directory}.lock"):
        if not said.exists():
            demo = small_demo(directory, "--ranks", "2", *SMALL)
            assert demo.code == 0, demo.said
            said.write_text(demo.said)
    return SmallDemo(directory, said.read_text(), 0)
