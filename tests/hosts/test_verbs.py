"""`evaluate` and `generate` on two machines: the same as in one process, and no rank waits for one that is lost."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from megatron_stable.analysis.evaluation import evaluate, open_data
from megatron_stable.analysis.trained import open_run
from tests.commands.conftest import SmallDemo, small
from tests.hosts.launches import ENVIRONMENT, commands
from tests.hosts.machines import NAMES, Machines

__all__ = ["small"]
SECONDS = 60.0  # for a machine that does other things, too; far less than the lifeline's patience
CODES = {"torchrun": [1, 1], "mpirun": [137], "srun": [137]}  # the last two tell that of the rank that was killed
LAUNCHERS = pytest.mark.parametrize("launcher", CODES)


class Use:
    """A verb that a launcher has started, with one rank on each machine."""

    def __init__(
        self, two: Machines, launcher: str, folder: Path, verb: Sequence[object], request: pytest.FixtureRequest
    ) -> None:
        if launcher == "mpirun" and shutil.which("mpirun") is None:
            pytest.skip("needs mpirun (Debian: openmpi-bin)")
        variables = request.getfixturevalue("cluster") if launcher == "srun" else {}
        (folder / "hosts").write_text("".join(f"{name} slots=1\n" for name in NAMES))
        self.machines, self.out = two, folder / "out"
        words = ["megatron_stable", *map(str, verb)]
        self.processes = [
            machine.start([*command[:-3], *words], folder, self.out, {**ENVIRONMENT, **variables})
            for machine, command in zip(two, commands(launcher, folder / "use.yaml", 1), strict=False)
        ]

    @property
    def printed(self) -> str:
        return self.out.read_text(errors="replace")

    def ranks(self, machine: int) -> list[psutil.Process]:
        found = self.machines[machine].processes("megatron_stable")
        return [each for each in found if "megatron_stable" in each.cmdline()[:4] and "python" in each.name()]

    def end(self, seconds: float) -> list[int]:
        """Exit codes of the launchers, once no rank is left."""
        deadline = time.monotonic() + seconds
        codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        while left := [*self.ranks(0), *self.ranks(1)]:
            assert time.monotonic() < deadline, (left, self.printed)
            time.sleep(0.1)
        return codes


@pytest.mark.full
@LAUNCHERS
def test_each_launcher(
    two: Machines, small: SmallDemo, tmp_path: Path, launcher: str, request: pytest.FixtureRequest
) -> None:
    verb = ["evaluate", small.run, "--batches", 1, "--json", "parallel.tensor=2"]
    use = Use(two, launcher, tmp_path, verb, request)
    assert use.end(2 * SECONDS) == [0] * len(use.processes), use.printed
    (line,) = [line for line in use.printed.splitlines() if line.startswith("{")]
    trained = open_run(small.run)
    assert json.loads(line)["loss"] == pytest.approx(evaluate(trained, open_data(trained), 1).loss, rel=1e-5)


@pytest.mark.full
@LAUNCHERS
@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_killed(
    two: Machines, small: SmallDemo, tmp_path: Path, launcher: str, lost: int, request: pytest.FixtureRequest
) -> None:
    verb = ["generate", small.run, "--prompt=def ", "--tokens=1000000", "--temperature=0", "parallel.pipeline=2"]
    use = Use(two, launcher, tmp_path, verb, request)
    deadline = time.monotonic() + 2 * SECONDS
    while "def " not in use.printed:
        assert time.monotonic() < deadline, use.printed
        time.sleep(0.1)
    (rank,) = use.ranks(lost)
    rank.kill()
    assert use.end(SECONDS) == CODES[launcher], use.printed
    assert "checkpoint" not in use.printed
    if launcher == "torchrun":  # the other two end the rest at once
        assert f"error: rank {lost} on {NAMES[lost]} was lost; stopping" in use.printed
