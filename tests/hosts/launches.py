"""How each launcher starts two ranks on each of two machines, from the first."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.hosts.machines import NAMES, Machines
from tests.training.runs import ROOT, metrics

PYTHON, BIN = sys.executable, Path(sys.executable).parent
EACH = 2  # ranks on a machine
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
OPENMPI = "--allow-run-as-root --mca btl_tcp_if_include cable"


def commands(launcher: str, config: Path, each: int) -> list[list[str | Path]]:
    """What is typed on the first machine and, if there is a second one, on the second."""
    module: list[str | Path] = ["megatron_stable.pretrain", "--config", config]
    deepspeed: list[str | Path] = [BIN / "deepspeed", "--hostfile", "hosts"]
    torchrun: list[str | Path] = [PYTHON, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", str(each)]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{NAMES[0]}:29400", "--rdzv-id", config.stem, "-m"]
    no_ssh: list[str | Path] = ["--no_ssh", "--master_addr", NAMES[0], "--module", *module]
    given = ["-x", f"MASTER_ADDR={NAMES[0]}", *(word for name in ENVIRONMENT for word in ("-x", name))]
    srun: list[str | Path] = ["srun", "--nodes=2", f"--ntasks-per-node={each}", "--overcommit"]
    own: list[str | Path] = [PYTHON, "-m", "megatron_stable", "launch", "--config", config, "--hostfile", "hosts"]
    return {
        "launch": [own],
        "launch openmpi": [[*own, "--launcher", "openmpi"]],
        "launch slurm": [[*own, "--launcher", "slurm"]],
        "pdsh": [[*deepspeed, "--module", *module]],
        "openmpi": [
            [*deepspeed, "--launcher", "openmpi", "--launcher_args", f"{OPENMPI} -x MASTER_ADDR={NAMES[0]}"]
            + ["--module", *module]
        ],
        "no_ssh": [[*deepspeed, "--node_rank", str(number), *no_ssh] for number in range(2)],
        "torchrun": [[*torchrun, *module]] * 2,
        "mpirun": [["mpirun", *OPENMPI.split(), "--hostfile", "hosts", *given, PYTHON, "-m", *module]],
        "srun": [[*srun, PYTHON, "-m", *module]],
    }[launcher]


class Launch:
    """A run that a launcher has started.

    Args:
        folder: For its files; holds the data.
        values: The run's settings.
        variables: Added to the environment.
    """

    def __init__(
        self,
        machines: Machines,
        launcher: str,
        folder: Path,
        values: dict[str, Any],
        variables: Mapping[str, str] | None = None,
        each: int = EACH,
    ) -> None:
        self.machines, self.run = machines, Path(values["run"]["directory"])
        self.output = folder / f"{launcher.replace(' ', '-')}.out"
        config = self.run.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(values))
        (folder / "hosts").write_text("".join(f"{name} slots={each}\n" for name in NAMES))
        (folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in ENVIRONMENT.items()))
        given = {**ENVIRONMENT, **(variables or {})}
        self.begun = time.monotonic()
        self._at_begin = self._lines()
        self.processes = [
            machine.start(command, folder, self.output, given)
            for machine, command in zip(machines, commands(launcher, config, each), strict=False)
        ]

    @property
    def printed(self) -> str:
        """All that it printed on both machines."""
        return self.output.read_text(errors="replace")

    def await_steps(self, more: int, seconds: float = 200.0) -> None:
        """Wait until it has trained some steps."""
        deadline = time.monotonic() + seconds
        while self._lines() < self._at_begin + more:
            assert self.processes[0].poll() is None, self.printed
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.05)

    def end(self, seconds: float) -> list[int]:
        """Exit codes, once all of it has ended: the launchers, and the ranks on both machines."""
        deadline = time.monotonic() + seconds
        codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        while left := self.ranks():
            assert time.monotonic() < deadline, (left, self.printed)
            time.sleep(0.1)
        return codes

    def ranks(self) -> dict[int, psutil.Process]:
        """Processes that train."""
        return {number: process for machine in self.machines for number, process in machine.ranks().items()}

    def saved(self) -> list[int]:
        """Steps of its checkpoints."""
        return sorted(int(path.name.removeprefix("step_")) for path in (self.run / "checkpoints").glob("step_*"))

    def last(self) -> int:
        """The last step on record."""
        return max(metrics(self.run))

    def _lines(self) -> int:
        path = self.run / "metrics.jsonl"
        return len(path.read_bytes().splitlines()) if path.exists() else 0
