"""Whether those who started this process are still there: its launcher, its front end, the connection it came through.

A rank whose terminal is closed or whose launcher is killed hears nothing of it, or only SIGHUP, and would train on
unseen.
"""

from __future__ import annotations

import os
import select

import psutil

from megatron_stable.parallel.launcher import seat

FRONT = "MEGATRON_STABLE_FRONT"  # process id of `pretrain --ranks`, whose ranks have a session of their own
SHELLS = {"sh", "bash", "dash", "zsh", "fish", "ksh", "csh", "tcsh", "busybox"}  # may leave a run behind on purpose
DAEMONS = ("sshd", "slurmstepd", "orted", "prted", "hydra_pmi_proxy", "pmi_proxy")  # connections to other machines


def starters() -> list[psutil.Process]:
    """The processes above this one that are there for its sake.

    Those of its launcher's session, or of its own, but for shells: who leaves a terminal may want the run to go on, and
    says so with nohup. Of a session that was begun from afar, also the daemon that holds the connection.
    """
    found = []
    try:
        above = psutil.Process().parents()
        session = os.getsid(above[0].pid if seat() else 0)  # torchrun gives each rank a session of its own
        for process in above:
            if process.pid == 1 or (os.getsid(process.pid) != session and not process.name().startswith(DAEMONS)):
                break
            if process.name() == "sshd" and process.ppid() == 1:
                break  # it listens for new connections, and may be started anew under those that there are
            if process.name() not in SHELLS:
                found.append(process)
    except (psutil.Error, OSError, IndexError):
        pass
    return found


class Starters:
    """Those of this process, which is best asked when it begins. Called now and then: words on the first that has
    ended, ``None`` while all live."""

    def __init__(self) -> None:
        self._gone: str | None = None
        self._watched = {process: f"{process.pid} ({_name(process)})" for process in starters()}
        if front := os.environ.get(FRONT):
            try:
                self._watched[psutil.Process(int(front))] = f"{front} (pretrain)"
            except psutil.Error:
                self._gone = f"process {front} (pretrain), which started it, has ended"

    def __call__(self) -> str | None:
        for process, name in self._watched.items():
            if not _lives(process):
                self._gone = f"process {name}, which started it, has ended"
        if self._gone:
            drop_dead_streams()
        return self._gone


def drop_dead_streams() -> None:
    """Point stdout and stderr elsewhere where nobody can read them any more: writing there would be an error."""
    for stream in (1, 2):
        poll = select.poll()
        try:
            poll.register(stream, 0)
            if poll.poll(0):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)
        except OSError:
            continue


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return "gone"


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
