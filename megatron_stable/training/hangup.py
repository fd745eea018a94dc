"""Whether those who started this process are still there: its launcher, its front end, the connection it came through.

A rank whose terminal is closed or whose launcher is killed hears nothing of it, or only SIGHUP, and would train on
unseen.
"""

from __future__ import annotations

import os
import select
import stat

import psutil

from megatron_stable.parallel.launcher import seat

SHELLS = {"sh", "bash", "dash", "zsh", "fish", "ksh", "csh", "tcsh", "busybox"}  # may leave a run behind on purpose
DAEMONS = ("sshd", "slurmstepd", "orted", "prted", "hydra_pmi_proxy", "pmi_proxy")  # connections to other machines


def starters() -> list[psutil.Process]:
    """The processes that are there for this one's sake: above it and, where it was begun over ssh from this same
    machine, the other end of the connection with those above that."""
    found = _above(psutil.Process(), to_launcher=seat() is not None)
    if found and found[-1].name().startswith("sshd") and (client := _ssh_client()):
        found += [client, *_above(client, to_launcher=True)]
    return found


def _above(process: psutil.Process, to_launcher: bool) -> list[psutil.Process]:
    """The processes above one that are of its session, or of its launcher's: torchrun gives each rank a session of its
    own, and pdsh each ssh. But no shells: who leaves a terminal may want the run to go on, and says so with nohup. Of a
    session that was begun from afar, also the daemon that holds the connection.
    """
    found = []
    try:
        above = process.parents()
        session = os.getsid(above[0].pid if to_launcher else process.pid)
        for each in above:
            if each.pid == 1 or (os.getsid(each.pid) != session and not each.name().startswith(DAEMONS)):
                break
            if each.name() == "sshd" and each.ppid() == 1:
                break  # it listens for new connections, and may be started anew under those that there are
            if each.name() not in SHELLS:
                found.append(each)
    except (psutil.Error, OSError, IndexError):
        pass
    return found


def _ssh_client() -> psutil.Process | None:
    """The process on this machine that is the other end of this one's ssh connection, if there is such."""
    address, port, *_ = os.environ.get("SSH_CONNECTION", " ").split(" ")
    try:
        for each in psutil.net_connections("tcp"):
            if each.laddr and each.laddr.ip == address and str(each.laddr.port) == port and each.pid:
                return psutil.Process(each.pid)
    except (psutil.Error, OSError):
        pass
    return None


class Starters:
    """Those of this process, which is best asked when it begins. Called now and then: words on the first that has
    ended, ``None`` while all live."""

    def __init__(self) -> None:
        self._gone: str | None = None
        self._watched = {process: f"{process.pid} ({_name(process)})" for process in starters()}

    def __call__(self) -> str | None:
        for process, name in self._watched.items():
            if not _lives(process):
                self._gone = f"process {name}, which started it, has ended"
        if drop_dead_streams() and self._gone is None:
            self._gone = "nobody reads what it prints any more"
        return self._gone


def drop_dead_streams() -> bool:
    """Point stdout and stderr elsewhere where nobody can read them any more: writing there would be an error.

    Returns:
        Whether one of them was a pipe: a terminal may be left on purpose.
    """
    pipes = False
    for stream in (1, 2):
        poll = select.poll()
        try:
            poll.register(stream, 0)
            if poll.poll(0):
                pipes |= stat.S_ISFIFO(os.fstat(stream).st_mode) or stat.S_ISSOCK(os.fstat(stream).st_mode)
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)
        except OSError:
            continue
    return pipes


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
