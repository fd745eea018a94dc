"""The file system of the run's directory: room, speed, one and the same on all machines, locks, renaming.

Rank 0 makes a folder beside the run, the first rank of each machine works in it, and rank 0 removes it. Each call is
waited for so long and no longer, so that a file server that hangs is told of and holds nobody up.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil
import torch.distributed as dist

from megatron_stable.analysis.durability import at_a_time, checkpoint_bytes
from megatron_stable.config.schema import Config
from megatron_stable.doctor.bounded import Late, within
from megatron_stable.doctor.crew import Crew
from megatron_stable.doctor.finding import Finding, Verdict

T = TypeVar("T")
LIMIT = 45.0  # seconds for each step
SEEN = 30.0  # seconds in which a file of rank 0 must show on other machines
PIECE, MOST, SECONDS = 2**24, 2**28, 1.0  # bytes between syncs, bytes in all, seconds after which it is enough
SWITCHING = 0.5  # seconds of renaming and reading
SHARED, UNSHARED = "the same as rank 0's", "not the same as rank 0's"
LOCKS = "two runs in one directory would be told apart by what they write there alone, which takes half a minute"


class Switched(NamedTuple):
    """What a reader saw while a file was replaced again and again."""

    reads: int
    torn: int
    failed: int


class Storage:
    """One rank's part; after a step that hung, it takes no further ones."""

    def __init__(self, crew: Crew) -> None:
        self.crew, self.findings, self.hung = crew, list[Finding](), False

    def step(self, what: str, work: Callable[[], T]) -> T | None:
        """What a step on this rank returns; ``None``: it hung or failed, or an earlier one hung."""
        if self.hung:
            return None
        try:
            return within(LIMIT, work)
        except Late as late:
            self.hung = True
            remedy = "see to the file server and its mount on this machine: a run would hang there, too"
            self.findings.append(Finding("storage", f"{what}: {late}", Verdict.FAILURE, remedy))
        except OSError as error:
            remedy = "choose a directory that this user may write to: run.directory, or --directory"
            text = f"{what}: {error.strerror or error}"
            self.findings.append(Finding("storage", text, Verdict.FAILURE, remedy))
        return None

    def add(self, text: str, verdict: Verdict = Verdict.OK, remedy: str = "", **more: Any) -> None:
        """Find something."""
        self.findings.append(Finding(more.pop("check", "storage"), text, verdict, remedy, **more))


def check_storage(crew: Crew) -> list[Finding]:
    """Findings on the first rank of each machine; collective."""
    own = Storage(crew)
    word: list[Any] = [None]
    if crew.rank == 0:
        word = [own.step(f"make a folder for {crew.directory}", lambda: _make_folder(crew.directory))]
    dist.broadcast_object_list(word, src=0)
    if word[0] is None:
        return own.findings
    folder = Path(word[0])
    try:
        if crew.leads:
            own.step("look at the file system", lambda: _room(own, folder.parent))
        _sharing(own, folder)
        if crew.leads and not own.hung:
            own.step("write", lambda: _speed(own, folder))
        _locking(own, folder)
        _switching(own, folder)
    finally:
        dist.barrier()
        if crew.rank == 0:
            own.step("remove what was written", lambda: shutil.rmtree(folder, ignore_errors=True))
    return own.findings


def _make_folder(directory: Path) -> str:
    """A new folder in a directory, or in what is there of its path; the run's directory is not made."""
    there = next(each for each in (directory.absolute(), *directory.absolute().parents) if each.is_dir())
    folder = there / f".megatron-stable-doctor-{secrets.token_hex(4)}"
    folder.mkdir()
    return str(folder)


def _room(own: Storage, there: Path) -> None:
    """Its kind, and its room for checkpoints."""
    usage, kind = psutil.disk_usage(str(there)), kind_of(there)
    numbers, text = {"free": usage.free / 1e9}, f"{there} is on {kind}, {{free:.1f}} GB free"
    size = _size(own.crew.config)
    config = own.crew.config
    if kind in ("tmpfs", "ramfs") and config is not None:
        own.add(text, Verdict.WARNING, "what is there takes main memory and is lost at a restart", numbers=numbers)
        return
    if size is None or config is None:
        own.add(text, numbers=numbers)
        return
    keep = at_a_time(config)
    text += f"; a checkpoint takes {size / 1e9:.2f} GB, and {keep} are there at a time"
    if usage.free < 2 * size:
        own.add(text, Verdict.FAILURE, "make room, or choose another run.directory", numbers=numbers)
    elif usage.free < keep * size:
        own.add(text, Verdict.WARNING, "make room, or lower checkpoint.keep", numbers=numbers)
    else:
        own.add(text, numbers=numbers)


def kind_of(path: Path) -> str:
    """The type of a path's file system: ext4, nfs4, lustre, ..."""
    real = path.resolve()
    mounts = [p for p in psutil.disk_partitions(all=True) if real.is_relative_to(p.mountpoint)]
    return str(max(mounts, key=lambda p: len(p.mountpoint)).fstype) if mounts else "an unknown file system"


def _size(config: Config | None) -> float | None:
    """Bytes of a checkpoint of the run; ``None``: its vocabulary is not known yet."""
    return None if config is None or config.model.vocab_size is None else checkpoint_bytes(config)


def _sharing(own: Storage, folder: Path) -> None:
    """Whether all machines see what rank 0 writes, and how soon. Collective."""
    crew, token = own.crew, folder / "token"
    if len(crew.leaders) == 1:
        return
    word = [secrets.token_hex(8) if crew.rank == 0 else ""]
    dist.broadcast_object_list(word, src=0)
    if crew.rank == 0:
        own.step("write", lambda: _write_synced(token, word[0].encode()))
    elif crew.leads:
        seconds = own.step("read", lambda: _seen(token, word[0].encode()))
        if seconds is not None and seconds < SEEN:
            text = f"{SHARED}: a file of its shows here after {{seconds:.2f}} s"
            own.add(text, check="shared storage", numbers={"seconds": seconds})
        else:
            own.hung = True  # nothing of what follows can be had here
            remedy = "run.directory must be on a file system that all machines mount at the same path"
            own.add(f"{UNSHARED}: its file {folder} does not show", Verdict.FAILURE, remedy, check="shared storage")
    dist.barrier()


def _seen(path: Path, content: bytes) -> float:
    """Seconds until a file shows with its content; ``SEEN`` if it does not."""
    start = time.monotonic()
    while (spent := time.monotonic() - start) < SEEN:
        with suppress(OSError):  # not there, or the server stumbles
            if path.read_bytes() == content:
                return spent
        time.sleep(0.005)
    return SEEN


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _speed(own: Storage, folder: Path) -> None:
    """How fast this machine writes, to the disk and not to memory, while all others do."""
    piece, written, start = os.urandom(PIECE), 0, time.monotonic()
    with (folder / f"speed_{own.crew.rank}").open("wb", buffering=0) as file:
        while written < MOST and (not written or time.monotonic() - start < SECONDS):
            written += file.write(piece)
            os.fsync(file.fileno())
    rate = written / (time.monotonic() - start) / 1e6
    text, size = "{rate:,.0f} MB/s with fsync", _size(own.crew.config)
    numbers = {"rate": rate}
    if size is not None:
        numbers["seconds"] = size / len(own.crew.leaders) / rate / 1e6
        text += ", {seconds:,.0f} s for a checkpoint by all machines together"
    own.add(text, check="writing", numbers=numbers, speed="rate")


def _locking(own: Storage, folder: Path) -> None:
    """Whether a lock that rank 0 holds keeps others out. Collective."""
    path = folder / "lock"
    held = own.step("lock", lambda: _lock(path)) if own.crew.rank == 0 else None
    dist.barrier()
    if own.crew.leads:
        found = own.step("lock", lambda: _lock(path))
        if found is not None:
            locked, file = found
            if not own.hung and held is not None and held[0] is None:
                own.add("flock is not to be had here", Verdict.WARNING, LOCKS, check="locks")
            elif locked:
                own.add("flock does not keep others out", Verdict.WARNING, LOCKS, check="locks")
            else:
                own.add("flock keeps others out", check="locks")
            file.close()
    dist.barrier()
    if held is not None:
        held[1].close()


def _lock(path: Path) -> tuple[bool | None, Any]:
    """(whether it could be locked; ``None``: there are no locks, the open file)."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False, file
    except OSError:
        return None, file
    return True, file


def _switching(own: Storage, folder: Path) -> None:
    """Whether a file that rank 0 replaces again and again is whole for all who read it. Collective."""
    path = folder / "switched"
    if own.crew.rank == 0:
        own.step("write", lambda: _replace(path, b"a"))
    dist.barrier()
    if not own.crew.leads:
        return
    if own.crew.rank == 0:
        writer = threading.Thread(target=_replace_often, args=(path,), daemon=True)
        writer.start()
    seen = own.step("read", lambda: _read_often(path))
    if seen is None:
        return
    if seen.torn:
        remedy = "checkpoints and records are replaced so: choose another file system for run.directory"
        text = f"renaming is not atomic: {seen.torn} of {seen.reads} reads did not see a whole file"
        own.add(text, Verdict.FAILURE, remedy, check="renaming")
    elif seen.failed:
        remedy = "readers of this project try again, so this is no fault"
        text = "atomic; {failed:.0f} of {reads:.0f} reads failed for a moment"
        numbers = {"failed": float(seen.failed), "reads": float(seen.reads)}
        own.add(text, Verdict.OK, remedy, check="renaming", numbers=numbers)
    else:
        own.add("atomic: {reads:.0f} reads saw whole files", check="renaming", numbers={"reads": float(seen.reads)})


def _replace(path: Path, letter: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(letter * 4096)
    new.replace(path)


def _replace_often(path: Path) -> None:
    end = time.monotonic() + SWITCHING
    with suppress(OSError):
        for letter in _letters():
            if time.monotonic() > end:
                return
            _replace(path, letter)


def _letters() -> Iterator[bytes]:
    while True:
        yield from (b"a", b"b")


def _read_often(path: Path, seconds: float = SWITCHING) -> Switched:
    reads = torn = failed = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        reads += 1
        try:
            torn += path.read_bytes() not in (b"a" * 4096, b"b" * 4096)
        except FileNotFoundError:
            torn += 1
        except OSError:  # of a file that has gone from the server while it was open
            failed += 1
    return Switched(reads, torn, failed)
