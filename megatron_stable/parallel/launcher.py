"""What a launcher tells a process of its place among the ranks, through the environment. Nothing heavy is imported."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import sys
import time
from itertools import chain, product
from typing import NamedTuple

import psutil

from megatron_stable.errors import JoinError
from megatron_stable.parallel.mpi import address_of_rank_0

START = "MEGATRON_STABLE_START"  # names one start of all ranks; our own launcher's
# (rank, world size, rank on this machine; what names the start), by torchrun and deepspeed, Open MPI, MPICH and srun
VARIABLES: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
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
SPEAKS = 5.0  # seconds that a rank which fails stays, for the one that says why: many launchers end all with the first


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
    if (names := _variables()) is None:
        return None
    rank, size, local, _ = names
    return Seat(int(os.environ[rank]), int(os.environ[size]), int(os.environ.get(local, "0")))


def alone() -> dict[str, str]:
    """This process's environment for one that is no rank of its launcher's."""
    place = {name for names in VARIABLES for name in names[:3]} | {"MASTER_ADDR", "MASTER_PORT"}
    return {name: value for name, value in os.environ.items() if name not in place}


def first_on_machine() -> bool:
    """Whether this process is the one of its machine to say what all of them would."""
    mine = seat()
    return mine is None or mine.local == 0


def refuse(text: str, code: int) -> int:
    """Say on one rank of each machine why it does not begin; returns the exit code. The others wait for that one, as it
    may come later, and launchers end all ranks when the first ends."""
    if first_on_machine():
        print(f"error: {socket.gethostname()}: {text}", file=sys.stderr, flush=True)
    else:
        time.sleep(SPEAKS)
    return code


def start() -> str:
    """What names this start of all ranks, if its launcher gives it a name: ranks of another have no business here."""
    names = _variables()
    return ".".join(os.environ[name] for name in names[3] if name in os.environ) if names else ""


def _variables() -> tuple[str, str, str, tuple[str, ...]] | None:
    """Those that this process's launcher has set."""
    for names in VARIABLES:
        rank, size, local, _ = names
        # srun --mpi=pmi2 sets MPICH's, too, but not the rank on this machine
        pmi2 = rank == "PMI_RANK" and local not in os.environ and os.environ.get(rank) == os.environ.get("SLURM_PROCID")
        if {rank, size} <= os.environ.keys() and not pmi2:
            return names
    return None


def hosts(size: int) -> dict[int, str]:
    """The machine of each of ``size`` ranks, as far as the launcher lets it be known: DeepSpeed's and Slurm's do."""
    return _deepspeeds_hosts() or _slurms_hosts(size)


def expanded(hostlist: str) -> list[str]:
    """The hosts of a list as Slurm writes it: "node[003-004,9],rack[1-2]n[1-2]" -> node003, node004, node9, rack1n1, …

    https://slurm.schedmd.com/scontrol.html (hostlist expressions)

    Raises:
        ValueError: It is none.
    """
    found: list[str] = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", hostlist):
        parts = re.split(r"\[([^\]]*)\]", item)  # text, range, text, range, …, text
        choices = [_numbers(part) if place % 2 else [part] for place, part in enumerate(parts)]
        found += ["".join(choice) for choice in product(*choices)]
    return found


def _numbers(ranges: str) -> list[str]:
    """ "003-005,9" -> 003, 004, 005, 9"""
    bounds = [each.partition("-")[::2] for each in ranges.split(",")]
    return [f"{number:0{len(first)}}" for first, last in bounds for number in range(int(first), int(last or first) + 1)]


def _tasks(counts: str) -> list[int]:
    """Of each host: "2(x3),1" -> 2, 2, 2, 1. ValueError: no such list."""
    found = []
    for each in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", each)
        if match is None:
            raise ValueError(counts)
        found += [int(match[1])] * int(match[2] or 1)
    return found


def _deepspeeds_hosts() -> dict[int, str]:
    try:
        command = psutil.Process().parents()[0].cmdline()
        encoded = next(each.partition("=")[2] for each in command if each.startswith("--world_info="))
        machines = json.loads(base64.urlsafe_b64decode(encoded))
        return dict(enumerate(host for host, slots in machines.items() for _ in slots))
    except (psutil.Error, IndexError, StopIteration, ValueError, AttributeError, TypeError):
        return {}


def _slurms_hosts(size: int) -> dict[int, str]:
    """Nothing, unless srun started the ranks themselves, in the order of the hosts."""
    environment = os.environ
    own, distribution = environment.get("SLURM_PROCID"), environment.get("SLURM_DISTRIBUTION", "block")
    mine = seat()
    if mine is None or own != str(mine.rank) or not distribution.startswith("block"):
        return {}
    try:
        nodes = expanded(environment.get("SLURM_STEP_NODELIST", ""))
        tasks = _tasks(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    except ValueError:
        return {}
    named = [*chain.from_iterable([node] * count for node, count in zip(nodes, tasks, strict=False))]
    known = len(nodes) == len(tasks) and len(named) == size
    here = environment.get("SLURMD_NODENAME")  # else torchrun, or another launcher that srun has started
    return dict(enumerate(named)) if known and here in (None, named[mine.rank]) else {}


def first_machine(size: int) -> str:
    """Address of rank 0's machine where the launcher does not say it. Collective.

    Raises:
        JoinError: On all ranks: there is no telling.
    """
    environment = os.environ
    within_mpi = "OMPI_COMM_WORLD_RANK" in environment  # its daemons are a step of Slurm's without the first machine
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if nodes and not within_mpi:
        return expanded(nodes)[0]
    if str(size) == environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", environment.get("MPI_LOCALNRANKS")):
        return "127.0.0.1"
    try:
        return address_of_rank_0(size)
    except (ImportError, RuntimeError) as error:  # no mpi4py, or no MPI that it can load
        if jobs := environment.get("SLURM_JOB_NODELIST"):
            return expanded(jobs)[0]
        raise JoinError(
            "this launcher does not say where rank 0 is: set MASTER_ADDR to the address of its machine (mpirun -x "
            "MASTER_ADDR=HOST …, deepspeed: a line MASTER_ADDR=HOST in .deepspeed_env), or have MPI tell, by pip "
            f"install 'megatron-stable[mpi]' on all machines ({str(error).splitlines()[0]})"
        ) from None
