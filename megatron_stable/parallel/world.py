"""Join the world of ranks under any launcher, and end with it when a rank is lost."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_stable.errors import ConfigError

# (rank, world size, rank on this machine), as torchrun and deepspeed, Open MPI, MPICH and Slurm name them
VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


def environment_rank() -> int:
    """This process's rank by what its launcher set, 0 without one; no process group is needed."""
    return next((int(os.environ[rank]) for rank, size, _ in VARIABLES if {rank, size} <= os.environ.keys()), 0)


def join_world() -> None:
    """Initialise torch.distributed and DeepSpeed: NCCL with CUDA, else gloo; a world of one without a launcher.

    Raises:
        ConfigError: The launcher started several ranks, but the address of the first is unknown.
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
        torch.cuda.set_device(int(environment["LOCAL_RANK"]))
    with quiet():
        import deepspeed  # takes seconds, so only where ranks really start

        # an op that only inference calls and that would be compiled for 40 s at the first start
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)


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
    raise ConfigError("set MASTER_ADDR to the address of the machine of rank 0 (with mpirun: -x MASTER_ADDR=HOST)")


def _free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


class Lifeline:
    """Notices within seconds that a rank is gone, even while this one waits for it in a collective.

    A thread of each rank waits for a byte from the next rank, which comes when that one leaves in order. If its
    process dies instead, the connection breaks, this process ends itself, and so on around the ring. Collective.
    """

    def __init__(self) -> None:
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        self._thread: threading.Thread | None = None
        if self.size > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(days=3650))
            dist.barrier(self.group)  # connects all pairs, on the main thread
            self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        try:
            dist.recv(torch.zeros(1), src=(self.rank + 1) % self.size, group=self.group)
        except Exception:
            if not crash_is_known():
                print(f"rank {self.rank}: another rank was lost; stopping", flush=True)
            os._exit(1)

    def leave(self) -> None:
        """Leave in order. Collective."""
        if self._thread is not None:
            dist.send(torch.zeros(1), dst=(self.rank - 1) % self.size, group=self.group)
            self._thread.join()


def announce_crash() -> None:
    """Tell the other ranks that this one prints the error, so that they end quietly."""
    try:
        _store().set("crash", "1")
    except Exception:
        return  # the store went down with rank 0, which has printed an error of its own


def crash_is_known() -> bool:
    """Whether some rank has announced that it crashed."""
    try:
        return bool(_store().check(["crash"]))
    except Exception:
        return False


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
