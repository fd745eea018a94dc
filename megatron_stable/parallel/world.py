"""Join the world of ranks under any launcher."""

from __future__ import annotations

import logging
import os
import re
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_stable.errors import ConfigError

# (rank, world size, rank on this machine), as torchrun and deepspeed, Open MPI, MPICH and srun name them
VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # SLURM_NTASKS is set in a batch script, too
)


def environment_rank() -> int:
    """This process's rank by what its launcher set, 0 without one; no process group is needed."""
    return next((int(os.environ[rank]) for rank, size, _ in VARIABLES if {rank, size} <= os.environ.keys()), 0)


def join_world(patience: float = 1800.0) -> None:
    """Initialise torch.distributed and DeepSpeed: NCCL with CUDA, else gloo; a world of one without a launcher.

    Args:
        patience: Seconds that ranks wait for each other in a collective.

    Raises:
        ConfigError: The launcher started several ranks, but the address of the first is unknown; or, on this rank
            alone, it has no GPU.
    """
    environment = os.environ
    for rank, size, local in VARIABLES:
        if rank in environment and size in environment:
            environment["RANK"], environment["WORLD_SIZE"] = environment[rank], environment[size]
            environment["LOCAL_RANK"] = environment.get(local, "0")
            break
    else:
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = _first_host()
    environment.setdefault("MASTER_PORT", "29500")
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        index = device_index(int(environment["LOCAL_RANK"]), torch.cuda.device_count())
        torch.cuda.set_device(index)
        # DeepSpeed takes the rank on this machine for the number of the device, and wants all names of it to agree
        environment["LOCAL_RANK"] = str(index)
        if "OMPI_COMM_WORLD_LOCAL_RANK" in environment:
            environment["OMPI_COMM_WORLD_LOCAL_RANK"] = str(index)
    _allow_open_files()
    with quiet():
        import deepspeed  # takes seconds, so only where ranks really start

        # an op that only inference calls, which would be compiled at the first start
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            "nccl" if on_gpu else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=patience),
        )


def device_index(local_rank: int, devices: int) -> int:
    """The number of the GPU of a rank, of ``devices`` that its process sees: Slurm can show each just its own.

    Args:
        local_rank: Among the ranks of its machine.

    Raises:
        ConfigError: There are several, but not one for each rank.
    """
    if devices == 1:
        return 0
    if local_rank >= devices:
        raise ConfigError(
            f"{socket.gethostname()} has {devices} GPUs for this process and at least {local_rank + 1} ranks: start at "
            "most as many ranks per machine as it has GPUs, or show each just one (srun --gpus-per-task=1)"
        )
    return local_rank


def _allow_open_files() -> None:
    """Let this process have as many open files as it may: rank 0 keeps the store, with two connections per rank."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 2**16 if hard == resource.RLIM_INFINITY else min(hard, 2**16)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what DeepSpeed prints about itself from the user; errors are exceptions and come through."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


def _first_host() -> str:
    """Address of rank 0's machine where the launcher leaves it to us."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if nodes:  # "node[003-006,9],other" -> "node003"
        match = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
        assert match is not None
        return match[1] + (match[2] or "")
    if os.environ["WORLD_SIZE"] == os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", os.environ.get("MPI_LOCALNRANKS")):
        return "127.0.0.1"
    error = ConfigError("set MASTER_ADDR to the address of the machine of rank 0 (with mpirun: -x MASTER_ADDR=HOST)")
    error.agreed = True
    raise error


def _free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def first_to_crash() -> bool:
    """Whether this rank crashes before all others, and so has the cause to tell, or there is no knowing."""
    try:
        return int(key_value_store().add("crashed ranks", 1)) == 1
    except Exception:
        return True  # the store has not begun, or went down with rank 0


def key_value_store() -> Any:
    """The process group's store, through which ranks talk off the main thread; not for large values."""
    return dist.distributed_c10d._get_default_store()
