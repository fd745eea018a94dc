"""An error on one rank ends all ranks within seconds, and is what is printed last."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.runs import ROOT, error_lines, finish, layout, pretrain, rank_processes, settings

CASES = {
    "rank 1 of TP": (layout(tensor=2), "1"),
    "rank 0 of PP": (layout(pipeline=2), "0"),
    "all ranks": (layout(tensor=2), "0,1"),
}


HOST = socket.gethostname()
OFTEN = ("rank 0 of PP",)


def last_event(run: Path) -> dict[str, Any]:
    event: dict[str, Any] = json.loads((run / "ledger.jsonl").read_text().splitlines()[-1])
    return event


@pytest.mark.parametrize("case", [it if it in OFTEN else pytest.param(it, marks=pytest.mark.full) for it in CASES])
def test_an_exception_ends_the_run_with_its_traceback_last(folder: Path, case: str) -> None:
    parallel, crashing = CASES[case]
    process = pretrain(
        settings(folder, parallel=parallel),
        PYTHONPATH=os.pathsep.join([str(ROOT), str(Path(__file__).parent / "crash")]),
        CRASHING_RANK=crashing,
    )
    began = time.monotonic()
    code, output = finish(process)
    assert code == 1, output
    assert time.monotonic() - began < 150  # most of it is starting up; a hang would take half an hour
    lines = output.splitlines()
    assert lines[-1] == "ArithmeticError: the weights are lost"
    assert output.count("Traceback") == 1, output
    assert f"rank {crashing} failed:" in lines or crashing == "0,1"
    assert "frame #" not in output and "[INFO]" not in output and "another rank" not in output
    assert not rank_processes(process.pid)
    stop = last_event(folder / "run")
    assert (stop["event"], stop["exit_code"], stop["step"]) == ("stop", 1, 3)
    first = crashing.partition(",")[0] if crashing != "0,1" else r"\d"
    assert re.fullmatch(rf"rank {first} on {HOST}: ArithmeticError: the weights are lost", stop["reason"])


@pytest.mark.full
def test_data_that_goes_bad_under_a_run_ends_it_with_a_message(folder: Path) -> None:
    values = settings(folder, steps=100_000, checkpoint={"every": 1_000_000}, batch={"global_size": 2})
    process = pretrain(values)
    while not (folder / "run/metrics.jsonl").exists():
        assert process.poll() is None, finish(process)[1]
        time.sleep(0.01)
    with (folder / "data.bin").open("r+b") as file:  # through the memory map
        file.write(np.full(4000, 60_000, np.uint16).tobytes())
    code, output = finish(process)
    assert code == 5, output
    assert "Traceback" not in output
    assert len(error_lines(output)) == 1
    assert "token id 60000" in output.splitlines()[-1]
    stop = last_event(folder / "run")
    assert (stop["event"], stop["exit_code"]) == ("stop", 5)
    assert "token id 60000" in stop["reason"]
