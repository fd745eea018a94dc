"""Join the world of ranks under any launcher, and end with it when a rank is lost."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import threading
import time
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

        # an op that only inference calls, which would be compiled at the first start
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
    error = ConfigError("set MASTER_ADDR to the address of the machine of rank 0 (with mpirun: -x MASTER_ADDR=HOST)")
    error.agreed = True
    raise error


def _free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


class Lifeline:
    """Ends this process within seconds when a rank is lost, even while it waits for that rank in a collective.

    A thread of each rank waits for a word from the next rank. If that one leaves in order, it says so. If it crashes,
    or its process dies and the connection breaks, this rank passes the word on and ends, and so on around the ring.
    Collective.
    """

    LEAVES, CRASHES = 0.0, 1.0
    PATIENCE = 1.5  # seconds before following a crashed rank, whose exit code is the one that the launcher should see

    def __init__(self) -> None:
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        self._thread: threading.Thread | None = None
        if self.size > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(days=3650))
            dist.barrier(self.group)  # connects all pairs, on the main thread
            self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        word, neighbour = torch.full((), self.CRASHES), (self.rank + 1) % self.size
        try:
            dist.recv(word, src=neighbour, group=self.group)
        except Exception:
            if first_to_crash():
                print(f"error: rank {neighbour} was lost; stopping", file=sys.stderr, flush=True)
        if word != self.LEAVES:
            self.crash()
            time.sleep(self.PATIENCE)
            os._exit(1)

    def crash(self) -> None:
        """Take the other ranks along: they end soon."""
        try:
            self._say(self.CRASHES)
        except Exception:
            return  # that rank is gone already

    def leave(self) -> None:
        """Leave in order. Collective."""
        self._say(self.LEAVES)
        if self._thread is not None:
            self._thread.join()

    def _say(self, word: float) -> None:
        if self._thread is not None:
            dist.send(torch.full((), word), dst=(self.rank - 1) % self.size, group=self.group)


def first_to_crash() -> bool:
    """Whether this rank crashes before all others, and so has the cause to tell, or there is no knowing."""
    try:
        return int(key_value_store().add("crashed ranks", 1)) == 1
    except Exception:
        return True  # the store has not begun, or went down with rank 0


def key_value_store() -> Any:
    """The process group's store, through which ranks talk off the main thread; not for large values."""
    return dist.distributed_c10d._get_default_store()
