"""Who trains a run now, and what it is asked to do: ``RUN/ranks.json`` and ``RUN/stop.json``."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_stable.disk import patiently
from megatron_stable.errors import DataError
from megatron_stable.files import write_file
from megatron_stable.persisted import Count, Persisted, read_as
from megatron_stable.records.owner import OWNER, PATIENCE, Owner, machine, read_owner

RANKS, REQUEST = "ranks.json", "stop.json"


class Rank(Persisted):
    """A process of the last start of a run.

    Attributes:
        machine: What tells its host, and the container there, from all others.
        began: When the process did, in the kernel's ticks, which a clock that is set does not move.
    """

    host: str
    machine: str
    pid: Count
    began: Count

    @classmethod
    def myself(cls) -> Rank:
        """This process."""
        return cls(host=socket.gethostname(), machine=_place(), pid=os.getpid(), began=begin_of(os.getpid()) or 0)

    @property
    def visible(self) -> bool:
        """Whether it is, or was, where this process can see whether it lives."""
        return self.machine == _place()

    @property
    def here(self) -> bool:
        """Whether it is visible, and lives."""
        return self.visible and begin_of(self.pid) == self.began


class Start(Persisted):
    """The last start of a run: when (seconds since 1970), where its ranks met, and its ranks."""

    began: float
    address: str
    ranks: tuple[Rank, ...]

    def led_by(self, owner: Owner) -> bool:
        """Whether an owner of the run is its rank 0."""
        return bool(self.ranks) and (self.ranks[0].host, self.ranks[0].pid) == (owner.host, owner.pid)

    def hosts(self) -> dict[str, list[int]]:
        """Numbers of ranks by host."""
        found: dict[str, list[int]] = {}
        for number, rank in enumerate(self.ranks):
            found.setdefault(rank.host, []).append(number)
        return found

    def alive_here(self) -> dict[int, int]:
        """Process ids, by rank, of those that live on this machine."""
        return {number: rank.pid for number, rank in enumerate(self.ranks) if rank.here}


class Request(Persisted):
    """That a run stop: by whom, whether it is to save first, and which of its owners is asked."""

    by: str
    save: bool = True
    token: str


def write_start(run: Path, ranks: Sequence[Rank], place: str) -> None:
    """Record who has begun to train, and where they have met. DataError: it cannot be written."""
    start = Start(began=time.time(), address=place, ranks=tuple(ranks))
    write_file(run / RANKS, f"{start.model_dump_json()}\n".encode())


def last_start(run: Path) -> Start | None:
    """The last start of a run, if it has begun to train."""
    return read_as(Start, run / RANKS) if patiently((run / RANKS).exists, run / RANKS) else None


def owner(run: Path) -> Owner | None:
    """Who trains a run, ``None`` if nobody does; to find out takes a while if that is another machine."""
    found = read_owner(run / OWNER)
    if found is None:
        return None
    start = last_start(run)
    if start is not None and start.led_by(found) and start.ranks[0].visible:
        return found if start.ranks[0].here else None
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        time.sleep(0.5)
        now = read_owner(run / OWNER)
        if now is None or now != found:
            return now
    return None


def ask_to_stop(run: Path, who: Owner, by: str, save: bool) -> None:
    """Leave the wish that a run stop. DataError: it cannot be written."""
    write_file(run / REQUEST, f"{Request(by=by, save=save, token=who.token).model_dump_json()}\n".encode())


def request(run: Path) -> Request | None:
    """What a run is asked, if anything."""
    try:
        return read_as(Request, run / REQUEST)
    except DataError:
        return None


def forget_request(run: Path) -> None:
    """What was asked is done."""
    (run / REQUEST).unlink(missing_ok=True)


def begin_of(pid: int) -> int | None:
    """When a process of this machine began, in ticks since its boot; ``None``: there is none that lives."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else int(rest[18])


def _place() -> str:
    """This machine and, as process ids mean something there only, the container on it."""
    try:
        return f"{machine()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return machine()
