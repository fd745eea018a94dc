"""What a machine says of itself before ranks are started there: ``-m megatron_stable.launching.survey QUESTION``.

Runs on every machine, over ssh: it imports what starts fast, asks nothing that can wait for long, and prints a line.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import xxhash

from megatron_stable.parallel.addresses import others_reach

MARK = "megatron-stable survey: "  # what shells' start files print goes before
REACH = 5.0  # seconds for an answer of the first machine, and for a file to be seen
SOURCE, CONFIG = "megatron_stable's source", "the configuration file"
FREE, TAKEN = "refused", "taken"  # what a port answers
DIGESTS = (SOURCE, CONFIG)


@dataclass
class Question:
    """What to look at.

    Attributes:
        first: Names and addresses of the machine of rank 0: the first that answers is taken.
        port: Where the ranks would meet there.
        token: A file that was just written beside the run's directory.
        config: The run's YAML.
    """

    first: list[str]
    port: int
    token: str
    config: str


@dataclass
class Survey:
    """A machine.

    Attributes:
        clock: Its time, seconds since 1970.
        versions: Of what trains, by package.
        source: Digest of this package's source.
        config: Digest of the run's YAML; empty: it is not there.
        sees: Whether the file ``token`` is there.
        free: Bytes free where it is.
        first: Address that the name of the first machine means here.
        answer: What its port answers: FREE (nobody listens), TAKEN, or why it is out of reach.
        addresses: Of this machine, that others may reach.
        ranks: Command lines, by process id, of ranks that train here already.
    """

    host: str
    clock: float
    python: str
    versions: dict[str, str]
    source: str
    config: str
    sees: bool
    free: int
    first: str
    answer: str
    cores: int
    gpus: int
    addresses: list[str] = field(default_factory=list)
    ranks: dict[str, str] = field(default_factory=dict)


def must_agree(of: Survey) -> dict[str, str]:
    """What must not differ between machines, by what it is called."""
    return {"python": of.python, **of.versions, SOURCE: of.source, CONFIG: of.config}


def survey(question: Question) -> Survey:
    """This machine."""
    first, answer = _knock(question.first, question.port)
    token = Path(question.token)
    sees = _appears(token)
    return Survey(
        host=socket.gethostname(),
        clock=time.time(),
        python=platform.python_version(),
        versions={name: _version(name) for name in ("megatron-stable", "torch", "deepspeed")},
        source=_digest(Path(__file__).parents[1]),
        config=_file_digest(Path(question.config)),
        sees=sees,
        free=shutil.disk_usage(token.parent).free if token.parent.is_dir() else 0,
        first=first,
        answer=answer,
        cores=len(os.sched_getaffinity(0)),
        gpus=len(list(Path("/proc/driver/nvidia/gpus").glob("*"))),
        addresses=others_reach(),
        ranks=_ranks(),
    )


def _knock(hosts: list[str], port: int) -> tuple[str, str]:
    """(address, what its port answers) of the first host that answers; else of the very first one."""
    said = [_knock_at(host, port) for host in hosts[:1]]
    while said[-1][1] not in (FREE, TAKEN) and len(said) < len(hosts):
        said.append(_knock_at(hosts[len(said)], port))
    return said[-1] if said[-1][1] in (FREE, TAKEN) else said[0]


def _knock_at(host: str, port: int) -> tuple[str, str]:
    try:
        address = str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        return "", str(error.strerror or error)
    try:
        with socket.create_connection((address, port), timeout=REACH):
            return address, TAKEN
    except ConnectionRefusedError:
        return address, FREE
    except OSError as error:
        return address, str(error.strerror or error)


def _appears(path: Path) -> bool:
    """Whether a file is there; one that was written elsewhere may take a moment."""
    end = time.monotonic() + REACH
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.25)
        with suppress(OSError):
            next(path.parent.iterdir(), None)  # has NFS ask its server
    return True


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _digest(folder: Path) -> str:
    found = xxhash.xxh3_64()
    for path in sorted(folder.rglob("*.py")):
        found.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def _file_digest(path: Path) -> str:
    try:
        return xxhash.xxh3_64(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _ranks() -> dict[str, str]:
    found = {}
    for each in psutil.process_iter():
        with suppress(psutil.Error):
            command = each.cmdline()
            launches = {"deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run"} & {*command}
            if "megatron_stable.pretrain" in command and "python" in each.name() and not launches:
                found[str(each.pid)] = " ".join(command[command.index("megatron_stable.pretrain") :])
    return found


if __name__ == "__main__":
    print(MARK + json.dumps(asdict(survey(Question(**json.loads(sys.argv[1]))))), flush=True)
