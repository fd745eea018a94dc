"""Whose a run's directory is: one process at a time, on one machine or on several that share a file system.

A lock (`flock`) goes with its process, but on many shared file systems no other machine sees it. So the owner also says
who it is in ``RUN/owner.json``, and counts in there while it lives. Whoever wants the directory and finds an owner on
another machine watches that count, without comparing clocks: if it moves, the run is in use; if it stands still for
PATIENCE seconds, the owner is gone. An owner that finds itself replaced, after its machine was cut off for longer than
that, ends at once: two runs must never write to one directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from megatron_stable.disk import open_plain
from megatron_stable.errors import DataError, InUseError
from megatron_stable.files import replace_file
from megatron_stable.persisted import Count, Persisted

LOCK, OWNER = ".lock", "owner.json"
BEAT = 10.0  # seconds from one count to the next
PATIENCE = 60.0  # seconds without one after which an owner is gone
LEASE = 120.0  # seconds for which a file server may keep the lock of a machine that is gone
RETRIES = (0.2, 1.0, 4.0)  # seconds between attempts to read what makes no sense
JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "KUBERNETES_POD_NAME")


class Owner(Persisted):
    """A process that has a run's directory.

    Attributes:
        host: Name of its machine.
        machine: The same, without the chance that two machines have it.
        pid: Its process id there.
        job: Of the scheduler, if there is one.
        token: Its own, whatever the others are.
        beats: Its count.
    """

    host: str
    machine: str
    pid: Count
    job: str | None = None
    token: str
    beats: Count = 0

    @classmethod
    def myself(cls) -> Owner:
        """This process."""
        job = next((os.environ[name] for name in JOBS if name in os.environ), None)
        return cls(host=socket.gethostname(), machine=machine(), pid=os.getpid(), job=job, token=os.urandom(8).hex())

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


class Claim:
    """This process's claim to a run's directory, from :meth:`take` until it is released.

    Args:
        run: The directory.
        lost: Called from a thread, with a message, if another process has taken the directory over.
    """

    def __init__(self, run: Path, lost: Callable[[str], None]) -> None:
        self.run, self.path, self._lost = run, run / OWNER, lost
        self.me = Owner.myself()
        self._lock: IO[bytes] | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="owner", daemon=True)

    def take(self) -> None:
        """Take the directory, or learn that it is in use, which may take some time.

        Raises:
            ConfigError: It is.
            OSError: It cannot be written to.
        """
        self._lock, locked = _locked(self.run)
        before = read_owner(self.path)
        if before is not None:
            _await_end(self.run, before, locked)
            print(f"taking {self.run} over from {before}, which ended without a word", file=sys.stderr, flush=True)
        self._write()
        self._thread.start()

    def release(self) -> None:
        """Give the directory back, as far as it was taken."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        found = read_owner(self.path)
        if found is not None and found.token == self.me.token:
            self.path.unlink()
        if self._lock is not None:
            self._lock.close()

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            found = read_owner(self.path)  # none: deleted by somebody who tidied
            if found is not None and found.token != self.me.token:
                self._lost(f"{self.run} was taken over by {found}: this run ends, to leave it alone")
                return
            self.me = self.me.model_copy(update={"beats": self.me.beats + 1})
            with contextlib.suppress(OSError):  # of a file system that stumbles, or is full
                self._write()

    def _write(self) -> None:
        replace_file(self.path, f"{self.me.model_dump_json()}\n".encode())


def machine() -> str:
    """What tells this machine from all others."""
    try:  # drawn by the kernel at each start
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def end_at_once(message: str) -> None:
    """End this process, and with it the run: the other ranks follow a lost one."""
    try:
        print(f"error: {message}", file=sys.stderr, flush=True)
    finally:  # whatever has become of stderr
        os._exit(DataError.exit_code)


def _locked(run: Path) -> tuple[IO[bytes], bool]:
    """The open lock file, and whether it is locked."""
    lock = (run / LOCK).open("wb")
    end = None
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however that ends
            return lock, True
        except BlockingIOError:
            owner = read_owner(run / OWNER)
            here = owner is None or owner.machine == machine()
            if here or (end is not None and time.monotonic() > end):
                lock.close()
                raise _in_use(run, owner) from None
            assert owner is not None
            if end is None:
                _await_end(run, owner, locked=False)
                end = time.monotonic() + LEASE
            time.sleep(min(1.0, LEASE / 10))
        except OSError:
            return lock, False  # a file system without locks


def _await_end(run: Path, owner: Owner, locked: bool) -> None:
    """Return when an owner has ended. ConfigError: it lives."""
    if owner.machine == machine():
        if locked:
            return
        if _alive(owner.pid):  # else in another container, perhaps
            raise _in_use(run, owner)
    print(f"{run} belongs to {owner}: watching for {PATIENCE:g} s whether it lives", file=sys.stderr, flush=True)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE / 10))
        found = read_owner(run / OWNER)
        if found is None:
            return  # it has left in order
        if found != owner:
            raise _in_use(run, found)


def _in_use(run: Path, owner: Owner | None) -> InUseError:
    who = f", {owner}" if owner else ""
    override = (
        f"; if you know that it has, delete {run / OWNER} and {LOCK}" if owner and owner.machine != machine() else ""
    )
    return InUseError(
        f"run.directory {str(run)!r} is in use by a run that has not ended{who}: "
        f"wait for it, stop it, or choose another directory{override}"
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def read_owner(path: Path) -> Owner | None:
    """What an owner says of itself; ``None``: there is none, or what is there says nothing."""
    for delay in (*RETRIES, None):
        try:  # with less patience than other files: the count must go on
            with open_plain(path) as file:
                return Owner.model_validate_json(file.read(2**16))
        except (OSError, ValueError, DataError):
            try:
                path.lstat()
            except FileNotFoundError:
                return None
            except OSError:
                pass
            if delay is not None:  # cut off, perhaps, by a file system that stumbles
                time.sleep(delay)
    return None
