"""A rank of a real run that is stopped, or gets nothing done: the run ends with its name and resumes."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from tests.harness.ranks import Ranks
from tests.training.runs import ROOT, curve, error_lines, finish, layout, pretrain, rank_processes, settings, train
from tests.training.test_killed import _wait_for_steps

STEPS, PATIENCE = 100_000, 20
pytestmark = pytest.mark.full  # test_lifeline.py has the same, and more, without a trainer
HOST = socket.gethostname()


def test_a_stopped_rank_ends_the_run_which_resumes(ranks: Ranks, folder: Path) -> None:
    values = settings(folder, "run", STEPS, parallel=layout(tensor=2), checkpoint={"every": 5, "keep": 2})
    values["run"]["patience"] = PATIENCE
    process = pretrain(values)
    _wait_for_steps(process, folder / "run", 12)
    rank_processes(process.pid)[1].suspend()
    began = time.monotonic()
    code, output = finish(process)
    assert code == 1, output
    assert time.monotonic() - began < PATIENCE + 60  # half of that is the launcher's, until it kills
    said = f"error: rank 1 on {HOST} fell silent "
    assert any(line.startswith(said) for line in error_lines(output)), output
    assert "in train_step" in output  # where rank 0 waits
    done = max(curve(folder / "run"))
    values["run"]["steps"] = done + 3
    assert ranks.run(2, train, values) == [0, 0]
    assert max(curve(folder / "run")) == done + 3


def test_a_rank_that_loops_ends_the_run_with_its_stack(folder: Path) -> None:
    values = settings(folder, "run", 20, parallel=layout(tensor=2))
    values["run"]["patience"] = PATIENCE
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent / "crash")])}
    process = pretrain(values, **environment, LOOPING_RANK="1")
    code, output = finish(process)
    assert code == 1, output
    (error,) = error_lines(output)
    assert error.startswith("error: no progress for 1"), output
    assert f"s: rank 1 on {HOST}, for whom others wait; stopping: its stack says where; " in error, output
    stuck, _, waiting = output.partition("\nrank 1:\n")[2].partition("\nrank 0:\n")
    assert "in loop" in stuck and "in loop" not in waiting
    assert "Traceback" not in output
