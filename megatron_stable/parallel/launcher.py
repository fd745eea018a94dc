"""What a launcher tells a process of its place among the ranks, through the environment. Nothing heavy is imported."""

from __future__ import annotations

import base64
import json
import os
import re
from typing import NamedTuple

import psutil

from megatron_stable.errors import ConfigError

START = "MEGATRON_STABLE_START"  # names one start of all ranks; our own launcher's
# (rank, world size, rank on this machine; what names the start), by torchrun and deepspeed, Open MPI, MPICH and srun
VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", (START, "TORCHELASTIC_RUN_ID")),
    (
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ()),
    # SLURM_NTASKS is set in a batch script, too
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ("SLURM_JOB_ID", "SLURM_STEP_ID")),
)  # fmt: skip
PORT = 29500


class Seat(NamedTuple):
    """A process's place.

    Attributes:
        local: Its rank on its machine.
    """

    rank: int
    size: int
    local: int


def seat() -> Seat | None:
    """This process's, by what its launcher set; ``None`` without one."""
    for rank, size, local, _ in VARIABLES:
        if {rank, size} <= os.environ.keys():
            return Seat(int(os.environ[rank]), int(os.environ[size]), int(os.environ.get(local, "0")))
    return None


def first_on_machine() -> bool:
    """Whether this process is the one of its machine to say what all of them would."""
    mine = seat()
    return mine is None or mine.local == 0


def start() -> str:
    """What names this start of all ranks, if its launcher gives it a name: ranks of another have no business here."""
    names = next((names for rank, size, _, names in VARIABLES if {rank, size} <= os.environ.keys()), ())
    return ".".join(os.environ[name] for name in names if name in os.environ)


def hosts() -> dict[int, str]:
    """The machine of each rank, as far as the launcher lets it be known: DeepSpeed's tells its processes."""
    try:
        command = psutil.Process().parents()[0].cmdline()
        encoded = next(each.partition("=")[2] for each in command if each.startswith("--world_info="))
        machines = json.loads(base64.urlsafe_b64decode(encoded))
        return dict(enumerate(host for host, slots in machines.items() for _ in slots))
    except (psutil.Error, IndexError, StopIteration, ValueError, AttributeError, TypeError):
        return {}


def first_machine(size: int) -> str:
    """Address of rank 0's machine where the launcher does not say it.

    Raises:
        ConfigError: On all ranks alike: there is no telling.
    """
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if nodes:  # "node[003-006,9],other" -> "node003"
        match = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
        assert match is not None
        return match[1] + (match[2] or "")
    if str(size) == os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", os.environ.get("MPI_LOCALNRANKS")):
        return "127.0.0.1"
    error = ConfigError("set MASTER_ADDR to the address of the machine of rank 0 (with mpirun: -x MASTER_ADDR=HOST)")
    error.agreed = True
    raise error
