"""Real gloo ranks for tests: ``ranks.run(4, function, *args)`` calls it on four processes of one fresh world.

A fork server imports torch and DeepSpeed once per session; each job forks its ranks from it (10 ms a rank). Processes
are not reused between jobs: DeepSpeed keeps groups, grids, RNG trackers and C++ globals per process, some of which
cannot be reset, and a fork is cheaper than resetting the others.

    parent (pytest) ──> fork server (torch, deepspeed) ──fork──> rank 0 … rank n-1
       ▲  one pipe per rank: the report (result or traceback) up, the release down  │
       └────────────────────────────────────────────────────────────────────────────┘

A rank that is done, or has failed, waits for the release, so that no rank sees a peer's connection close before
the parent knows why.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

MOST_RANKS = 8
GRACE = 0.5  # seconds in which other ranks may report after the first failure
ROOT = Path(__file__).resolve().parents[2]

# What a rank's environment holds from its first import on.
SERVER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    "PYTHONPATH": str(ROOT),
}

# How gloo and the store word the loss of a peer: the effect of a failure elsewhere, not a cause.
LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "recv, got 0 bytes",
    "gloo/transport",
)


class RankError(Exception):
    """A rank raised, died or did not finish. The message holds the traceback and what the rank printed."""

    def __init__(self, message: str, rank: int, exception: str):
        super().__init__(message)
        self.rank = rank
        """The rank that failed first."""
        self.exception = exception
        """Name of its exception's type; "Died" if the process ended, "Timeout" if it did not finish."""


@dataclass(frozen=True)
class Failure:
    """One rank's failure: what was raised, when (seconds, monotonic), and the text to show."""

    rank: int
    exception: str
    text: str
    at: float

    @property
    def is_effect(self) -> bool:
        """Whether this only says that another rank went away."""
        return any(words in self.text.lower() for words in LOST_PEER)


class Ranks:
    """Runs functions on worlds of 1 to 8 gloo ranks. One per pytest session, as the fixture ``ranks``."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.harness.preload"])

    def run(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        timeout: float = 120.0,
        only: Sequence[int] | None = None,
    ) -> list[Any]:
        """Call ``function(*args)`` on each rank of a new world; return the results in the order of the ranks.

        :param world_size: 1 to 8 ranks; ``torch.distributed`` and ``deepspeed.comm`` are initialised to that size.
        :param only: start these ranks of a world of any size, which imagine all others, one another included: nothing
            that they send arrives (torch's fake process group).
        :param function: a top-level function of an importable module.
        :param args: picklable; the results must be picklable too.
        :param timeout: seconds for the whole job.
        :raises RankError: a rank raised or died, or time ran out; all ranks are gone by then.
        """
        __tracebackhide__ = True
        if only is None and not 1 <= world_size <= MOST_RANKS:
            raise ValueError(f"world_size is {world_size}; 1 to {MOST_RANKS} are possible")
        if "<" in function.__qualname__:
            raise TypeError(f"{function.__qualname__} is not a top-level function: a rank cannot import it")
        name, port = f"{function.__module__}:{function.__qualname__}", _free_port()
        processes = []
        connections: list[Connection] = []
        with tempfile.TemporaryDirectory() as logs:
            try:
                self._start_server()
                for number, rank in enumerate(range(world_size) if only is None else only):
                    ours, theirs = self._context.Pipe()
                    world = (rank, world_size, None if only is not None else port)
                    job = (*world, timeout, _log(logs, number), list(sys.path), name, pickle.dumps(args))
                    process = self._context.Process(target=_rank_main, args=(theirs, *job), name=f"rank {rank}")
                    process.start()
                    theirs.close()
                    processes.append(process)
                    connections.append(ours)
                results = _collect(processes, connections, logs, timeout)
                for connection in connections:
                    connection.send_bytes(b"release")
                for process in processes:
                    process.join(timeout=5)
                for number in range(len(processes)):
                    for line in _printed(logs, number).splitlines():
                        print(f"[rank {number}] {line}")
                return results
            finally:
                for process in processes:
                    process.kill()
                for process, connection in zip(processes, connections, strict=True):
                    process.join()
                    connection.close()

    def _start_server(self) -> None:
        from multiprocessing.forkserver import ensure_running

        before = dict(os.environ)
        os.environ.update(SERVER_ENVIRONMENT)
        try:
            ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)


def _collect(processes: Sequence[BaseProcess], connections: list[Connection], logs: str, timeout: float) -> list[Any]:
    """Wait for every rank's report; raise the failure that came first."""
    __tracebackhide__ = True
    results: dict[int, Any] = {}
    failures: list[Failure] = []
    waiting = dict(zip(connections, range(len(connections)), strict=True))
    deadline = time.monotonic() + timeout
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            try:
                succeeded, content = pickle.loads(connection.recv_bytes())  # noqa: S301 - from our own fork
            except (EOFError, ConnectionResetError):
                processes[rank].join()
                text = f"the process ended without a report ({_ending(processes[rank].exitcode)})"
                failures.append(Failure(rank, "Died", text, time.monotonic()))
            else:
                if succeeded:
                    results[rank] = content
                else:
                    failures.append(Failure(rank, *content))
        if failures:
            deadline = min(deadline, time.monotonic() + GRACE)
    if failures:
        first = min(failures, key=lambda failure: (failure.is_effect, failure.at))
        raise RankError(
            f"rank {first.rank} of {len(processes)} failed:\n{first.text}{_tail(logs, first.rank)}",
            first.rank,
            first.exception,
        )
    if waiting:
        late = sorted(waiting.values())
        for rank in late:
            os.kill(processes[rank].pid or 0, signal.SIGUSR1)  # each writes its stack to its log
        time.sleep(GRACE)
        stacks = "".join(f"\nrank {rank}:{_tail(logs, rank)}" for rank in late)
        raise RankError(
            f"no result from rank(s) {late} of {len(processes)} after {timeout:g} s:{stacks}", late[0], "Timeout"
        )
    return [results[rank] for rank in range(len(processes))]


def _rank_main(
    connection: Connection,
    rank: int,
    world_size: int,
    port: int | None,
    timeout: float,
    log: str,
    sys_path: list[str],
    name: str,
    args: bytes,
) -> None:
    """A rank's whole life."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    output = Path(log).open("wb", buffering=0)  # noqa: SIM115 - open for the rank's life
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    faulthandler.enable(output)
    faulthandler.register(signal.SIGUSR1, output)
    try:
        sys.path[:] = sys_path
        os.environ.pop("PYTHONPATH", None)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % MOST_RANKS), WORLD_SIZE=str(world_size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        import deepspeed
        import torch

        torch.set_num_threads(1)
        deepspeed.utils.logger.setLevel("WARNING")
        # DeepSpeed calls collectives by names that torch 2.13 deprecates: three lines per rank and step
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        module, function = name.split(":")
        call = getattr(importlib.import_module(module), function)
        if port is None:
            from torch.testing._internal.distributed.fake_pg import FakeStore

            torch.distributed.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        deepspeed.init_distributed(
            dist_backend="gloo" if port is not None else "fake",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=timeout + 60),  # later than the parent's, which shows where each rank stands
        )
        report = pickle.dumps((True, call(*pickle.loads(args))))  # noqa: S301 - from our own parent
    except BaseException as error:  # a rank's SystemExit is a failure too
        report = pickle.dumps((False, (type(error).__name__, traceback.format_exc(), time.monotonic())))
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send_bytes(report)
    try:
        connection.recv_bytes()
    except EOFError:
        pass
    os._exit(0)  # without DeepSpeed's and gloo's exit handlers, which may wait for peers


def _die_with_parent() -> None:
    """End this rank when pytest is gone, even in the middle of a collective."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _free_port() -> int:
    """A port for the store, from below the ephemeral range: no outgoing connection takes it before rank 0 does."""
    source = random.SystemRandom()  # not the seeded generator: two sessions on one machine must differ
    while True:
        port = source.randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _log(logs: str, rank: int) -> str:
    return f"{logs}/rank_{rank}.log"


def _printed(logs: str, rank: int) -> str:
    path = Path(_log(logs, rank))
    return path.read_text(errors="replace") if path.exists() else ""


def _tail(logs: str, rank: int, most: int = 6000) -> str:
    printed = _printed(logs, rank).strip()
    return f"\n--- printed by rank {rank} ---\n{printed[-most:]}" if printed else ""


def _ending(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"exit code {exitcode}"
