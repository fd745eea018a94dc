"""A rank of a real run that pauses for some seconds: it is said, with its name, and the curve is the same."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_stable.analysis.status import status_of
from tests.harness.ranks import Ranks
from tests.training.runs import Values, curve, finish, layout, pretrain, rank_processes, settings, train
from tests.training.test_killed import _wait_for_steps

HOST = socket.gethostname()
STEPS, PAUSE = 40, 6.0


def values_of(folder: Path, name: str, steps: int) -> Values:
    values = settings(folder, name, steps, parallel=layout(tensor=2), checkpoint={"every": 500})
    values["run"]["patience"] = 30
    return values


def ledger(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def test_a_pause_is_said_and_the_curve_is_the_same(ranks: Ranks, folder: Path) -> None:
    assert ranks.run(2, train, values_of(folder, "whole", STEPS)) == [0, 0]
    assert [line["event"] for line in ledger(folder / "whole")] == ["start"], "nothing is said of healthy steps"
    process = pretrain(values_of(folder, "run", STEPS))
    _wait_for_steps(process, folder / "run", 10)
    rank_processes(process.pid)[1].suspend()
    time.sleep(PAUSE)
    rank_processes(process.pid)[1].resume()
    code, output = finish(process)
    assert code == 0, output
    assert curve(folder / "run") == curve(folder / "whole")
    start, waiting, went_on = ledger(folder / "run")
    assert (start["event"], waiting["event"], went_on["event"]) == ("start", "waiting", "went_on")
    assert waiting["ranks"] == [1] and waiting["who"].startswith(f"rank 1 on {HOST}")
    assert waiting["step"] == went_on["step"] and 10 <= went_on["step"] < STEPS
    assert 4.0 < waiting["seconds"] < PAUSE <= went_on["seconds"] + 0.5 < PAUSE + 5
    step = waiting["step"]
    assert re.search(rf"^step {step} has taken \d s; waiting for rank 1 on {HOST} \(", output, re.M), output
    assert re.search(rf"^step {step} went on after {went_on['seconds']:.0f} s$", output, re.M), output


@pytest.mark.parametrize("lost", [pytest.param(1, marks=pytest.mark.full), 0])  # that of rank 0 the last rank writes
def test_the_loss_of_a_rank_is_in_the_ledger_whoever_it_is(folder: Path, lost: int) -> None:
    process, run = pretrain(values_of(folder, "run", 100_000)), folder / "run"
    _wait_for_steps(process, run, 5)
    os.kill(rank_processes(process.pid)[lost].pid, signal.SIGKILL)
    code, output = finish(process)
    assert code == 1, output
    stop = ledger(run)[-1]
    assert (stop["event"], stop["exit_code"]) == ("stop", 1)
    assert stop["reason"] == f"rank {lost} on {HOST} was lost; the same command goes on from the last checkpoint"
    assert stop["step"] >= max(curve(run))
    assert status_of(run).events[-1].endswith(f"stopped with exit code 1: {stop['reason']}")
    assert stop["reason"] in (run / "logbook.md").read_text()
