"""Slurm on the two machines: a controller on the first, a node daemon on each, munge between them."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.hosts.machines import NAMES, Machines

PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "sinfo")
SBIN = os.environ["PATH"] + ":/usr/sbin:/sbin"
CONFIG = """
ClusterName=two
SlurmctldHost={first}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=/run/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=30
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SwitchType=switch/none
SlurmdParameters=config_overrides
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def lacking() -> str:
    """What is missing for it; empty: nothing."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=SBIN) is None]
    return f"needs {', '.join(missing)} (Debian: slurm-wlm munge)" if missing else ""


@contextmanager
def cluster(machines: Machines, folder: Path) -> Iterator[dict[str, str]]:
    """Slurm, until the end of the block. Yields what its commands need in their environment."""
    (folder / "state").mkdir(parents=True)
    for name in NAMES:
        (folder / f"spool-{name}").mkdir()
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    nodes = [
        f"NodeName={name} NodeAddr={address} CPUs=2 RealMemory=1000 State=UNKNOWN"
        for name, address in zip(NAMES, machines.network.addresses, strict=True)
    ]
    config = folder / "slurm.conf"
    values = {"first": NAMES[0], "address": machines.network.addresses[0], "folder": folder}
    config.write_text(CONFIG.format(nodes="\n".join(nodes), **values))
    variables = {"SLURM_CONF": str(config), "PATH": SBIN}
    daemons: list[subprocess.Popen[bytes]] = []

    def daemon(number: int, *command: str | Path) -> None:
        log = (folder / f"{command[0]}-{number}.out").open("wb")
        enter = machines[number].command(command)
        daemons.append(subprocess.Popen(enter, env={**os.environ, **variables}, stdout=log, stderr=log))

    try:
        for number, name in enumerate(NAMES):
            place = [f"--pid-file={folder}/munged-{name}.pid", f"--log-file={folder}/munged-{name}.log"]
            place += [f"--seed-file={folder}/munge-{name}.seed", "--socket=/run/munge.socket", f"--key-file={key}"]
            daemon(number, "munged", "--foreground", "--force", *place)
        daemon(0, "slurmctld", "-D", "-f", config)
        for number, name in enumerate(NAMES):
            daemon(number, "slurmd", "-D", "-N", name, "-f", config)
        _await_idle(machines, variables)
        yield variables
    finally:
        for each in machines:
            for mark in ("slurmstepd", "slurmd", "slurmctld", "munged"):
                for found in each.processes(mark):
                    found.kill()
        for process in daemons:
            process.wait(10)


def _await_idle(machines: Machines, variables: dict[str, str]) -> None:
    ask = machines[0].command(["sinfo", "--noheader", "--format=%T %D"])
    deadline = time.monotonic() + 30
    while True:
        answer = subprocess.run(ask, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
        if answer.stdout.split() == ["idle", str(len(NAMES))]:
            return
        assert time.monotonic() < deadline, f"Slurm does not come up: {answer.stdout}{answer.stderr}"
        time.sleep(0.2)
