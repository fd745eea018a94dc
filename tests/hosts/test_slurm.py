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


def until(true: Callable[[], object], why: Callable[[], str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline, why()
        time.sleep(0.2)


@pytest.mark.full
def test_a_job_whose_time_is_up_saves_and_is_queued_again(two: Machines, cluster: dict[str, str], folder: Path) -> None:
    run, output = folder / "run", folder / "job.out"
    environment = {**os.environ, **ENVIRONMENT, **cluster, "RANKS": "4", "BIN": str(BIN)}

    def slurm(*arguments: str) -> str:
        command = two[0].command(arguments, ROOT)
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    job = slurm(
        "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1",
        f"--output={output}", "examples/launch_slurm.sbatch", "laptop", *NARROW, f"run.directory={run}",
        f"data.train={folder / 'data'}",
    )  # fmt: skip

    def printed() -> str:
        return output.read_text() if output.exists() else slurm("scontrol", "show", "job", job)

    until(lambda: (run / "metrics.jsonl").exists() and len(curve(run)) > 3, printed)
    slurm("scancel", "--signal=TERM", "--batch", job)  # as --signal=B:TERM@600 does, ten minutes before the end
    until(lambda: "checkpoint of step" in printed(), printed)
    until(lambda: "Restarts=1" in slurm("scontrol", "show", "job", job), printed)
    last = max(curve(run))
    assert max(path.name for path in (run / "checkpoints").glob("step_*")) == f"step_{last:08d}"
    assert f"SIGTERM: stopped after step {last}, saved in" in printed()
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm has it wait for two minutes
    until(lambda: len(curve(run)) > last, printed)
    slurm("scancel", job)
    until(lambda: "JobState=CANCELLED" in slurm("scontrol", "show", "job", job), printed)
    time.sleep(3)
    assert "JobState=CANCELLED" in slurm("scontrol", "show", "job", job), "what was cancelled is not queued again"
