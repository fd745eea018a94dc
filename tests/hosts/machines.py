"""Two machines: each with a network, mounts, processes, shared memory and a name of its own, and an sshd. Needs root.

The file system is the one that both share, but for what distinguishes a machine: /etc/hosts, /etc/hostname, /run,
/dev/shm and the home's .ssh. A machine's processes die with its first one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.training.networks import Networks

NAMES = ("node1", "node2")
PROGRAMS = ("unshare", "nsenter", "ip", "sshd", "ssh", "ssh-keygen", "pdsh")
NEWS = ["--mount", "--pid", "--ipc", "--uts"]
DAEMONS = ("sshd", "munged", "slurmctld", "slurmd")  # that live as long as their machine
BOOT = """
set -e
hostname $NAME
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /sys/fs/cgroup
mkdir -p /run/sshd /run/lock
mount --bind $FOLDER/etc-hosts /etc/hosts
mkdir -p ~/.ssh && mount --bind $FOLDER/ssh ~/.ssh
set +e
$SSHD -D -e -f $FOLDER/sshd_config 2> $FOLDER/sshd.log &
while :; do wait -n || sleep 0.2; done
"""
SSHD_CONFIG = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/ssh/authorized_keys
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
"""


def lacking() -> str:
    """What keeps this machine from being two, in words; empty: nothing."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    if missing := [program for program in PROGRAMS if shutil.which(program, path=path) is None]:
        return f"needs {', '.join(missing)} (Debian: openssh-server openssh-client pdsh iproute2 util-linux)"
    if os.geteuid():
        return "needs root, for namespaces"
    with suppress(OSError, subprocess.CalledProcessError):
        Networks("probe").remove()
        subprocess.run(["unshare", *NEWS, "--fork", "mount", "-t", "proc", "proc", "/proc"], check=True)
        return ""
    return "namespaces are not allowed here"


class Machine:
    """One of them.

    Args:
        network: Name of its network namespace.
        folder: For its files; made.
        hosts: Text of its /etc/hosts.
        keys: Folder with the key pair that opens all machines.
    """

    def __init__(self, name: str, address: str, network: str, folder: Path, hosts: str, keys: Path) -> None:
        self.name, self.address, self._folder = name, address, folder
        (folder / "ssh").mkdir(parents=True)
        (folder / "etc-hosts").write_text(hosts)
        shutil.copy(keys / "id_ed25519", folder / "ssh")
        shutil.copy(keys / "id_ed25519.pub", folder / "ssh/authorized_keys")
        shutil.copy(keys / "known_hosts", folder / "ssh")
        (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
        shutil.copy(keys / "host_key", folder)
        variables = {"NAME": name, "FOLDER": str(folder), "SSHD": shutil.which("sshd", path="/usr/sbin") or "sshd"}
        enter = ["ip", "netns", "exec", network, "unshare", *NEWS, "--fork", "--kill-child", "--propagation", "private"]
        self._shell = subprocess.Popen([*enter, "bash", "-c", BOOT], env={**os.environ, **variables})
        self._first = _only_child(self._shell.pid)

    def command(self, arguments: Sequence[str | Path], folder: Path | None = None) -> list[str]:
        """What runs a command there, as on a terminal of its own."""
        place = ["--target", str(self._first.pid), "--net", "--mount", "--pid", "--ipc", "--uts"]
        inside = [f"--wdns={folder}"] if folder else []
        return ["nsenter", *place, *inside, "--", *map(str, arguments)]

    def start(
        self, arguments: Sequence[str | Path], folder: Path, output: Path, variables: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Begin a command there, as at a terminal of its own; what it prints is added to ``output``."""
        with output.open("ab") as file:
            return subprocess.Popen(
                self.command(["setsid", "--wait", *arguments], folder),
                env={**os.environ, **(variables or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )

    def processes(self, mark: str) -> list[psutil.Process]:
        """Its processes with a word in their command line, but for its first."""
        space = _space(self._first)
        found = []
        for each in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                there = each != self._first and _space(each) == space
                if there and mark in " ".join(each.cmdline()):
                    found.append(each)
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """Its processes that train, by rank."""
        names = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
        found = {}
        for each in self.processes("megatron_stable.pretrain"):
            with suppress(psutil.Error, StopIteration):
                variables = each.environ()
                if "python" in each.name() and "--config" in each.cmdline()[:6]:
                    found[next(int(variables[name]) for name in names if name in variables)] = each
        return found

    def sweep(self) -> None:
        """End what still runs there of a test."""
        for process in self.processes(""):
            with suppress(psutil.Error):
                session = "sshd" in process.name() and " -D " not in " ".join(process.cmdline())
                if session or process.name() not in DAEMONS:
                    process.kill()

    def end(self) -> None:
        """End all its processes, and itself."""
        with suppress(psutil.Error):
            self._first.kill()
        with suppress(ProcessLookupError):
            self._shell.send_signal(signal.SIGKILL)
        self._shell.wait(10)


class Machines:
    """The two, with the cable between them as ``network``."""

    def __init__(self, machines: Sequence[Machine], network: Networks) -> None:
        self.machines, self.network = machines, network

    def __getitem__(self, number: int) -> Machine:
        return self.machines[number]

    def __iter__(self) -> Iterator[Machine]:
        return iter(self.machines)

    def tidy(self) -> None:
        """As they were at the beginning."""
        self.network.mend()
        for each in self.machines:
            each.sweep()


@contextmanager
def machines(folder: Path) -> Iterator[Machines]:
    """Two of them, that reach each other by name."""
    keys = folder / "keys"
    keys.mkdir()
    for name in ("id_ed25519", "host_key"):
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)]
        subprocess.run(make, check=True)
    network = Networks("hosts")
    made: list[Machine] = []
    try:
        public = " ".join((keys / "host_key.pub").read_text().split()[:2])
        known = [f"{name},{address} {public}\n" for name, address in zip(NAMES, network.addresses, strict=True)]
        (keys / "known_hosts").write_text("".join(known))
        for name, address, space in zip(NAMES, network.addresses, network.names, strict=True):
            made.append(Machine(name, address, space, folder / name, hosts_file(name, network.addresses), keys))
        for each in made:
            _await_port(each, 22)
        yield Machines(made, network)
    finally:
        for each in made:
            each.end()
        network.remove()


def hosts_file(own: str, addresses: Sequence[str]) -> str:
    """As Debian and Ubuntu write it: a machine's own name means 127.0.1.1 there."""
    known = {**dict(zip(NAMES, addresses, strict=True)), own: "127.0.1.1"}
    return "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in known.items())


def at_terminal(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal as a terminal does: to the command that :meth:`Machine.start` began, and to all of its group."""
    os.killpg(psutil.Process(process.pid).children(recursive=True)[0].pid, number)


def _space(process: psutil.Process) -> str:
    """The process namespace that a process lives in."""
    return str(Path(f"/proc/{process.pid}/ns/pid").readlink())


def _only_child(pid: int) -> psutil.Process:
    deadline = time.monotonic() + 10
    while not (children := psutil.Process(pid).children()):
        assert time.monotonic() < deadline, "unshare has started nothing"
        time.sleep(0.02)
    return children[0]


def _await_port(machine: Machine, port: int) -> None:
    knock = ["bash", "-c", f"exec 3<>/dev/tcp/{machine.name}/{port}"]
    deadline = time.monotonic() + 20
    while subprocess.run(machine.command(knock), capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline, f"{machine.name} does not answer on port {port}"
        time.sleep(0.1)
