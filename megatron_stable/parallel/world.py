"""Join the world of ranks under any launcher."""

from __future__ import annotations

import logging
import os
import resource
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_stable.errors import ConfigError
from megatron_stable.parallel.addresses import interface_of
from megatron_stable.parallel.joining import meet
from megatron_stable.parallel.launcher import PORT, Seat, first_machine, seat, start

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_given: dict[str, str | None] = {}  # what the environment said of this process's place before it joined


def join_world(
    patience: float = 1800.0, timeout: float = 300.0, terms: Mapping[str, Any] | None = None, verbose: bool = False
) -> str:
    """Initialise torch.distributed and DeepSpeed: NCCL with CUDA, else gloo; a world of one without a launcher.

    Args:
        patience: Seconds that ranks wait for each other in a collective.
        timeout: Seconds that ranks wait for each other to begin.
        terms: What must be the same on all ranks, beside versions; see :func:`~megatron_stable.parallel.joining.meet`.
        verbose: Whether DeepSpeed may say what it does.

    Returns:
        Where the ranks have met: address and port.

    Raises:
        ConfigError: The launcher started several ranks, but the address of the first is unknown, or they did not come
            together; or, on this rank alone, it has no GPU.
    """
    mine, environment = seat(), os.environ
    _given.update({name: environment.get(name) for name in PLACE})
    if mine is None:
        mine = Seat(0, 1, 0)
        environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = first_machine(mine.size)
    environment.setdefault("MASTER_PORT", str(PORT))
    environment.update(RANK=str(mine.rank), WORLD_SIZE=str(mine.size), LOCAL_RANK=str(mine.local))
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        index = device_index(mine.local, torch.cuda.device_count())
        torch.cuda.set_device(index)
        # DeepSpeed takes the rank on this machine for the number of the device, and wants all names of it to agree
        environment["LOCAL_RANK"] = str(index)
        if "OMPI_COMM_WORLD_LOCAL_RANK" in environment:
            environment["OMPI_COMM_WORLD_LOCAL_RANK"] = str(index)
    _allow_open_files()
    place = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    if not dist.is_initialized():  # by who calls this as a library
        same = {"the start's name": start(), "the number of ranks": mine.size, **_versions(), **(terms or {})}
        place = _begin("nccl" if on_gpu else "gloo", mine, same, timeout, timedelta(seconds=patience))
    with quiet(verbose):
        import deepspeed  # takes seconds, so only where ranks really start

        # an op that only inference calls, which would be compiled at the first start
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return place


def leave_world() -> None:
    """Undo :func:`join_world`, so that this process may join another world."""
    dist.destroy_process_group()
    for name, value in _given.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _begin(backend: str, mine: Seat, terms: Mapping[str, Any], timeout: float, patience: timedelta) -> str:
    """Meet the other ranks, and make the process group; the place of the meeting."""
    store, address, place = meet(mine, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), terms, timeout)
    store.set_timeout(patience)
    interface = interface_of(address)
    if interface is not None:  # gloo would take what this machine's name means, which may be 127.0.1.1
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    dist.init_process_group(backend, store=store, rank=mine.rank, world_size=mine.size, timeout=patience)
    return place


def _versions() -> dict[str, str]:
    return {f"the version of {name}": version(name) for name in ("megatron-stable", "torch", "deepspeed")}


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
def quiet(verbose: bool = False) -> Iterator[None]:
    """Keep to itself what DeepSpeed prints, unless ``verbose``; errors are exceptions and come through."""
    if verbose:
        from deepspeed.utils.logging import set_log_level_from_string

        set_log_level_from_string("info")
        yield
        return
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


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
