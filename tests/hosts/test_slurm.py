"""The example's batch script under a real Slurm: it saves when its time is up, and is queued again."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hosts.launches import BIN, ENVIRONMENT
from tests.hosts.machines import Machines
from tests.training.runs import ROOT, VOCAB, curve

SECONDS = 120.0
NARROW = (
    "model.size=null", "model.layers=4", "model.hidden=32", "model.heads=4", "model.sequence_length=16",
    f"model.vocab_size={VOCAB}", "batch.global_size=8", "batch.micro_size=1", "data.tokenizer=null",
    "data.validation=null", "run.steps=100000", "checkpoint.every=100000", "logging.tensorboard=false",
)  # fmt: skip


class Job:
    """The example `laptop`, narrow, on both machines.

    Args:
        cluster: What Slurm's commands need in their environment.
        folder: Holds the data.
    """

    def __init__(self, two: Machines, cluster: dict[str, str], folder: Path) -> None:
        self.machine, self.run, self.output = two[0], folder / "run", folder / "job.out"
        self.environment = {**os.environ, **ENVIRONMENT, **cluster, "RANKS": "4", "BIN": str(BIN)}
        self.number = self.slurm(
            "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1",
            f"--output={self.output}", "examples/launch_slurm.sbatch", "laptop", *NARROW, f"run.directory={self.run}",
            f"data.train={folder / 'data'}",
        )  # fmt: skip
        self.until(lambda: (self.run / "metrics.jsonl").exists() and len(curve(self.run)) > 3)

    def slurm(self, *arguments: str) -> str:
        """What a command of Slurm's prints."""
        command = self.machine.command(arguments, ROOT)
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def state(self) -> str:
        return self.slurm("scontrol", "show", "job", self.number)

    def printed(self) -> str:
        return self.output.read_text() if self.output.exists() else self.state()

    def until(self, true: Callable[[], object]) -> None:
        deadline = time.monotonic() + SECONDS
        while not true():
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.2)

    def has_saved(self) -> bool:
        """Whether the last step is in a checkpoint, and the user told so."""
        last = max(curve(self.run))
        newest = max(path.name for path in (self.run / "checkpoints").glob("step_*"))
        return newest == f"step_{last:08d}" and f"SIGTERM: stopped after step {last}, saved in" in self.printed()


@pytest.mark.full
def test_a_job_whose_time_is_up_saves_and_is_queued_again(two: Machines, cluster: dict[str, str], folder: Path) -> None:
    job = Job(two, cluster, folder)
    job.slurm("scancel", "--signal=TERM", "--batch", job.number)  # as --signal=B:TERM@600 does, ten minutes before
    job.until(lambda: "Restarts=1" in job.state())
    assert job.has_saved(), job.printed()
    job.slurm("scancel", job.number)


@pytest.mark.full
def test_a_job_that_is_cancelled_saves_and_is_gone(two: Machines, cluster: dict[str, str], folder: Path) -> None:
    job = Job(two, cluster, folder)
    job.slurm("scancel", job.number)
    job.until(job.has_saved)
    job.until(lambda: "JobState=CANCELLED" in job.state())
    time.sleep(3)
    assert "JobState=CANCELLED" in job.state() and "Restarts=0" in job.state()
