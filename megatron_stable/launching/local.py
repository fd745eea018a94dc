"""Start the ranks of a run on this machine with DeepSpeed's launcher, and end with them."""

from __future__ import annotations

import base64
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import psutil

from megatron_stable.errors import ConfigError
from megatron_stable.parallel.launcher import START
from megatron_stable.training.pretrain import ERROR_FILE, RESUMES
from megatron_stable.training.stop import SIGNALS

# the launcher's log says nothing that a user needs, and would bury a rank's error
LAUNCHER = (
    "import logging, runpy; logging.disable(); runpy.run_module('deepspeed.launcher.launch', run_name='__main__')"
)


# A process group of its own, so that Ctrl-C at a terminal reaches the front end alone; but no session, so that ranks
# know the front end for who started them. An argument of Popen since 3.11.
OWN_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}


class Program(NamedTuple):
    """What ranks run.

    Attributes:
        again: What to say of a rank that was killed.
        stopped: What to say where a signal has ended ranks that had nothing to save, and the exit code then.
    """

    module: str
    again: str
    stopped: tuple[str, int]


TRAINING = Program(
    "megatron_stable.pretrain",
    f"; {RESUMES}",
    ("stopped before training began", 0),
)
EXAMINATION = Program("megatron_stable.doctor", "", ("stopped", 1))


def launch(program: Program, arguments: Sequence[str], ranks: int) -> int:
    """Run a program with these arguments on ``ranks`` ranks; returns the exit code.

    Signals go to the ranks, which stop in order, and not to the launcher, which would kill them. If a rank
    crashes, its error is printed last.

    Raises:
        ConfigError: The machine has GPUs, but fewer than ranks.
    """
    if 0 < (gpus := gpu_count()) < ranks:
        raise ConfigError(f"--ranks {ranks}, but this machine has {gpus} GPU(s): give at most as many ranks as GPUs")
    received: list[int] = []
    launcher: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if launcher is not None:
            _signal_ranks(launcher.pid, program.module, number)

    before = {number: signal.signal(number, forward) for number in SIGNALS if not ignored(number)}
    try:
        with tempfile.TemporaryDirectory(prefix="megatron-stable-") as scratch:
            error = Path(scratch) / "error"
            command = _command(program.module, arguments, ranks)
            launcher = subprocess.Popen(command, env=_environment(ranks, error), **OWN_GROUP)
            if received:
                _signal_ranks(launcher.pid, program.module, received[-1])
            code = launcher.wait()
            if error.is_file():
                first, _, text = error.read_text(encoding="utf-8").partition("\n")
                print(text, file=sys.stderr, end="", flush=True)
                return int(first)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
    return _explain(code, received, program)


def gpu_count() -> int:
    """GPUs that this process may use."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return 0
    import torch  # takes a second, which a wrong command line should not wait for

    return torch.cuda.device_count()


def _explain(code: int, received: list[int], program: Program) -> int:
    if code in range(6):
        return code
    died_of = -code if code < 0 else 256 - code  # the launcher exits with the code of a rank, as subprocess gives it
    if died_of in received:
        said, code = program.stopped
        print(f"{signal.Signals(died_of).name}: {said}", file=sys.stderr, flush=True)
        return code
    what = f"was killed by {signal.Signals(died_of).name}" if died_of in set(signal.Signals) else f"ended with {code}"
    print(f"error: a rank {what}{program.again}", file=sys.stderr, flush=True)
    return 1


def _command(module: str, arguments: Sequence[str], ranks: int) -> list[str]:
    devices = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    world = {"localhost": devices[:ranks] if len(devices) >= ranks else list(range(ranks))}
    encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    # fmt: off
    return [
        sys.executable, "-c", LAUNCHER, f"--world_info={encoded}", "--master_addr=127.0.0.1", f"--master_port={port}",
        "--no_local_rank", "--module", module, *arguments,
    ]
    # fmt: on


def _environment(ranks: int, error: Path) -> dict[str, str]:
    start = {START: secrets.token_hex(8)}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", ERROR_FILE: str(error), **start}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    return environment


def _signal_ranks(launcher: int, module: str, number: int) -> None:
    """Pass a signal on to the ranks, or end the launcher if it has not started any."""
    try:
        process = psutil.Process(launcher)
        for child in [child for child in process.children(recursive=True) if _is_rank(child, module)] or [process]:
            child.send_signal(number)
    except psutil.Error:
        return


def ignored(number: int) -> bool:
    """As nohup has it, for itself and what it starts."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def _is_rank(process: psutil.Process, module: str) -> bool:
    try:
        return module in process.cmdline() and "RANK" in process.environ()
    except psutil.Error:
        return False
