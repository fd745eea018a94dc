"""A cable that is cut, terminals and front ends that go, between two real machines."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.hosts.launches import Launch
from tests.hosts.machines import Machines, at_terminal
from tests.training.runs import layout, settings

STEPS = 100_000
SLACK = 40.0  # seconds, for a machine that does other things, too


def begin(two: Machines, folder: Path, launcher: str, **run: object) -> Launch:
    values = settings(folder, "run", STEPS, parallel=layout(tensor=1), checkpoint={"every": STEPS})
    values["run"] |= run
    launch = Launch(two, launcher, folder, values, each=1)
    launch.await_steps(3)
    return launch


def last_event(launch: Launch) -> dict[str, object]:
    found: dict[str, object] = json.loads((launch.run / "ledger.jsonl").read_text().splitlines()[-1])
    return found


@pytest.mark.full
def test_a_short_cut_is_survived_and_a_long_one_ends_both_sides(two: Machines, folder: Path) -> None:
    patience, flap = 40.0, 20.0
    launch = begin(two, folder, "pdsh", patience=patience)
    two.network.cut()
    time.sleep(flap)
    two.network.mend()
    launch.await_steps(launch.last() + 3, seconds=flap + SLACK)
    assert sorted(launch.ranks()) == [0, 1]
    two.network.cut()
    cut = time.monotonic()
    while launch.ranks():
        assert time.monotonic() - cut < patience + SLACK, launch.printed
        time.sleep(0.2)
    took = time.monotonic() - cut
    assert flap < took < patience + 5, "and how long Python takes to end on a busy machine"
    event = last_event(launch)
    assert (event["event"], event["exit_code"]) == ("stop", 1)
    assert "rank 1 on node2 fell silent" in str(event["reason"])
    assert "rank 1 on node2 fell silent" in launch.printed
    assert re.search(r"step \d+ has taken \d+ s; waiting for rank 1 on node2 \(silent for", launch.printed)
    assert re.search(r"step \d+ went on after \d+ s", launch.printed)


@pytest.mark.full
@pytest.mark.parametrize("gone", ["terminal", "deepspeed", "launch"])
def test_a_run_whose_starter_is_gone_saves_and_ends(two: Machines, folder: Path, gone: str) -> None:
    launch = begin(two, folder, "launch" if gone == "launch" else "pdsh")
    if gone == "terminal":
        at_terminal(launch.processes[0], signal.SIGHUP)
    else:
        first = psutil.Process(launch.processes[0].pid)
        below = [first, *first.children(recursive=True)]
        marks = {"launch": "megatron_stable launch", "deepspeed": "bin/deepspeed"}
        next(
            each
            for each in below
            if marks[gone] in " ".join(each.cmdline()) and "nsenter" not in each.name() and "setsid" not in each.name()
        ).kill()
    began = time.monotonic()
    while launch.ranks():
        assert time.monotonic() - began < SLACK, launch.printed
        time.sleep(0.1)
    assert launch.saved() == [launch.last()]
    event = last_event(launch)
    assert (event["event"], event["step"]) == ("stop", launch.last())
