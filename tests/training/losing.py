"""Worlds of ranks that train until one is lost: ``python -m tests.training.losing FOLDER [CASE…]``.

Runs all cases side by side, each a world of plain processes, and prints a line of JSON: by case, exit codes by rank,
seconds from the loss until all had ended, what was printed.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_stable.parallel.lifeline import Lifeline
from megatron_stable.parallel.notice import Word
from megatron_stable.training.pretrain import RESUMES
from tests.training.networks import Networks, possible

PATIENCE = 5.0
LOST = 2


class Case(NamedTuple):
    """``within`` happens on the lost rank, ``outside`` in the parent; both when all train."""

    ranks: int = 4
    lost: int = LOST
    within: Callable[[Lifeline], None] | None = None
    outside: Callable[[int, Networks | None], None] | None = None
    apart: bool = False  # each rank in a network of its own


def crash(lifeline: Lifeline) -> None:
    lifeline.crash("ValueError: no such thing", 5)
    time.sleep(2.0)  # until it has told why, on a busy machine
    os._exit(5)


def spin(lifeline: Lifeline) -> None:
    while True:
        pass


def hold(lifeline: Lifeline) -> None:
    ctypes.PyDLL(None).sleep(120)  # with the GIL


def stop(pid: int, networks: Networks | None) -> None:
    os.kill(pid, signal.SIGSTOP)


def kill(pid: int, networks: Networks | None) -> None:
    os.kill(pid, signal.SIGKILL)


def cut(pid: int, networks: Networks | None) -> None:
    assert networks is not None
    networks.cut()


CASES = {
    "killed": Case(outside=kill),
    "first killed": Case(outside=kill, lost=0),
    "crashes": Case(within=crash),
    "stopped": Case(outside=stop),
    "first stopped": Case(outside=stop, lost=0),
    "loops": Case(within=spin),
    "holds": Case(within=hold),
    "signal": Case(within=lambda lifeline: lifeline.stop("somebody said so")),
    "forsaken": Case(within=lambda lifeline: lifeline.stop("nobody is left", 1)),
    "cut": Case(ranks=2, lost=1, outside=cut, apart=True),
    "leaves": Case(),
}


def train(lifeline: Lifeline, until: Callable[[], bool], step: int = 0) -> None:
    value = torch.ones(1)
    while not until():
        step += 1
        with lifeline.step(step):
            dist.all_reduce(value)
        time.sleep(0.05)


def live(rank: int, case: Case, folder: Path, address: str, port: int) -> None:
    store = dist.TCPStore(address, port, case.ranks, is_master=rank == 0, timeout=timedelta(minutes=2))
    group = {"store": store, "rank": rank, "world_size": case.ranks, "timeout": timedelta(minutes=5)}
    dist.init_process_group("gloo", **group)  # type: ignore[arg-type]

    def record(word: Word) -> None:
        with (folder / f"words {rank}").open("a") as file:
            file.write(json.dumps([type(word).__name__, word._asdict()]) + "\n")

    lifeline = Lifeline(PATIENCE, record, RESUMES)
    lost = folder / "lost"
    with suppress(RuntimeError):  # gloo's, of a peer that is gone; training waits for the lifeline then
        steps = iter(range(10))
        train(lifeline, lambda: next(steps, None) is None)
        (folder / f"trains {rank}").touch()
        if case == CASES["leaves"]:
            time.sleep(0.3 * rank)
            lifeline.leave()
            os._exit(0)
        train(lifeline, lost.exists if rank == case.lost and case.within else lambda: False, 10)
        assert case.within is not None
        case.within(lifeline)
    time.sleep(300)


class World:
    """The processes of a case."""

    def __init__(self, name: str, folder: Path) -> None:
        self.case, self.folder = CASES[name], folder
        self.ended: dict[int, int] = {}
        self.lost_at: float | None = None
        self.seconds = 0.0
        self.networks = Networks(str(len(name))) if self.case.apart else None
        self.folder.mkdir()
        self.address = "127.0.0.1" if self.networks is None else self.networks.addresses[0]
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            self.port = server.getsockname()[1]
        self.pids = [self._start(rank) for rank in range(self.case.ranks)]

    def _start(self, rank: int) -> int:
        """The process id of a rank."""
        if pid := os.fork():
            return pid
        try:
            output = os.open(self.folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ["MASTER_ADDR"] = self.address
            os.environ["GLOO_SOCKET_IFNAME"] = "lo" if self.networks is None else "cable"
            if self.networks is not None:
                self.networks.enter(rank)
            live(rank, self.case, self.folder, self.address, self.port)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(9)

    def go_on(self) -> bool:
        """See what has become of it, and do what is next; whether it goes on."""
        ranks = range(self.case.ranks)
        if self.lost_at is None and all((self.folder / f"trains {rank}").exists() for rank in ranks):
            self.lost_at = time.monotonic()
            (self.folder / "lost").touch()
            if self.case.outside:
                self.case.outside(self.pids[self.case.lost], self.networks)
        for rank in ranks:
            if rank not in self.ended and (done := os.waitpid(self.pids[rank], os.WNOHANG))[0]:
                self.ended[rank] = os.waitstatus_to_exitcode(done[1])
                self.seconds = time.monotonic() - (self.lost_at or 0.0)
        if self.case.outside is stop and len(self.ended) == self.case.ranks - 1:
            os.kill(self.pids[self.case.lost], signal.SIGCONT)
        return len(self.ended) < self.case.ranks

    def result(self) -> dict[str, Any]:
        codes = [self.ended.get(rank) for rank in range(self.case.ranks)]
        words = {
            path.name.removeprefix("words "): [json.loads(line) for line in path.read_text().splitlines()]
            for path in self.folder.glob("words *")
        }
        printed = (self.folder / "stderr").read_text()
        return {"codes": codes, "seconds": self.seconds, "printed": printed, "words": words}

    def remove(self) -> None:
        for pid in (pid for rank, pid in enumerate(self.pids) if rank not in self.ended):
            os.kill(pid, signal.SIGKILL)
        if self.networks is not None:
            self.networks.remove()


def main() -> None:
    names = [name for name in sys.argv[2:] or CASES if not CASES[name].apart or possible()]
    worlds: dict[str, World] = {}
    deadline = time.monotonic() + 90
    try:
        worlds.update((name, World(name, Path(sys.argv[1], name))) for name in names)
        while sum(world.go_on() for world in worlds.values()) and time.monotonic() < deadline:
            time.sleep(0.05)
        print(json.dumps({name: world.result() for name, world in worlds.items()}))
    finally:
        for world in worlds.values():
            world.remove()


if __name__ == "__main__":
    main()
