"""Every launcher starts ranks on both of two machines, and goes on where the one before was stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.ranks import Ranks
from tests.hosts.launches import ENVIRONMENT, PYTHON, Launch
from tests.hosts.machines import Machines, at_terminal
from tests.training.runs import curve, layout, settings, train, write_data

STEPS = 100_000
SECONDS = 90.0  # from the wish to the end of all processes, on a machine that does other things, too
Stops = Callable[[Launch, dict[str, str]], None]


def terminal(number: int) -> Stops:
    return lambda launch, variables: at_terminal(launch.processes[0], number)


def verb(launch: Launch, variables: dict[str, str]) -> None:
    """On the second machine, which has neither the launcher nor rank 0."""
    command = launch.machines[1].command([PYTHON, "-m", "megatron_stable", "stop", launch.run], launch.run.parent)
    said = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=SECONDS)
    assert said.returncode == 0, said.stderr
    assert "stopped with exit code 0: stopped by" in said.stdout


def scancel(launch: Launch, variables: dict[str, str]) -> None:
    cancel = launch.machines[0].command(["scancel", "--signal=TERM", "--name=python"])
    subprocess.run(cancel, env={**os.environ, **variables}, check=True)


# by launcher: how it is stopped, and the exit codes then; docs/nodes.md has the same in words
CASES: dict[str, tuple[Stops, list[int]]] = {
    "launch": (terminal(signal.SIGINT), [0]),
    "pdsh": (terminal(signal.SIGINT), [1]),
    "openmpi": (verb, [0]),
    "no_ssh": (verb, [0, 0]),
    "torchrun": (terminal(signal.SIGTERM), [1, 0]),
    "mpirun": (terminal(signal.SIGTERM), [1]),
    "srun": (scancel, [0]),
    "launch openmpi": (terminal(signal.SIGTERM), [0]),
    "launch slurm": (terminal(signal.SIGHUP), [0]),
}
PAIRS = {"pdsh", "openmpi", "torchrun", "mpirun"}  # with two ranks on each machine, and TP 2; the others with one
NEEDS = {"openmpi": "mpirun", "launch openmpi": "mpirun", "mpirun": "mpirun"}


def values(folder: Path, tensor: int, steps: int = STEPS) -> dict[str, dict[str, Any]]:
    return settings(
        folder, "run", steps, parallel=layout(tensor=tensor), schedule={"kind": "constant"}, checkpoint={"every": STEPS}
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a dataset and the one run of this module."""
    folder = tmp_path_factory.mktemp("launchers")
    write_data(folder / "data")
    return folder


@pytest.mark.parametrize("launcher", ["launch", *(pytest.param(name, marks=pytest.mark.full) for name in [*CASES][1:])])
def test_goes_on_and_is_stopped(two: Machines, shared: Path, launcher: str, request: pytest.FixtureRequest) -> None:
    if (program := NEEDS.get(launcher)) and shutil.which(program) is None:
        pytest.skip(f"needs {program} (Debian: openmpi-bin)")
    variables = request.getfixturevalue("cluster") if "s" in launcher and launcher.endswith(("srun", "slurm")) else {}
    stops, codes = CASES[launcher]
    before = max(curve(shared / "run"), default=0) if (shared / "run/metrics.jsonl").exists() else 0
    each = 2 if launcher in PAIRS else 1
    launch = Launch(two, launcher, shared, values(shared, tensor=each), variables, each)
    launch.await_steps(3)
    assert [sorted(machine.ranks()) for machine in two] == [[*range(each)], [*range(each, 2 * each)]]
    wished = time.monotonic()
    stops(launch, variables)
    assert launch.end(SECONDS) == codes, launch.printed
    assert time.monotonic() - wished < SECONDS
    last = launch.last()
    assert before + 3 <= last < STEPS
    assert launch.saved()[-1] == last, "it was to save before it ended"
    assert set(curve(shared / "run")) == set(range(1, last + 1))
    ledger = [json.loads(line) for line in (launch.run / "ledger.jsonl").read_text().splitlines()]
    assert (ledger[-1]["event"], ledger[-1]["step"]) == ("stop", last)
    if codes[0] == 0:
        assert f"stopped after step {last}, saved in" in launch.printed


def test_all_of_them_together_trained_what_one_would(ranks: Ranks, shared: Path) -> None:
    """Whatever started the ranks, however often they were stopped and the layout was changed, the curve is the same."""
    if not (shared / "run/metrics.jsonl").exists():
        pytest.skip("no launcher ran")
    found = curve(shared / "run")
    alone = values(shared, 2, max(found))
    alone["run"]["directory"] = str(shared / "alone")
    assert ranks.run(4, train, alone) == [0] * 4
    expected = curve(shared / "alone")
    assert {step: pytest.approx(both, rel=1e-4) for step, both in expected.items()} == found
