"""Start the ranks of a run on this machine with DeepSpeed's launcher, and end with them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import psutil

from megatron_stable.training.pretrain import ERROR_FILE


def launch(arguments: Sequence[str], ranks: int) -> int:
    """Run ``megatron_stable.pretrain`` with these arguments on ``ranks`` ranks; returns the exit code.

    Signals go to the ranks, which stop in order, and not to the launcher, which would kill them. If a rank
    crashes, its error is printed last.
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    # fmt: off
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(port),
        "--no_local_rank", "--module", "megatron_stable.pretrain", *arguments,
    ]
    # fmt: on
    environment = dict(os.environ, PYTHONUNBUFFERED="1", DEEPSPEED_LOG_LEVEL="error")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    with tempfile.TemporaryDirectory(prefix="megatron-stable-") as scratch:
        environment[ERROR_FILE] = str(Path(scratch) / "error")
        # a session of its own, so that Ctrl-C at a terminal reaches this process alone
        launcher = subprocess.Popen(command, env=environment, start_new_session=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _forwarder(launcher.pid))
        code = launcher.wait()
        error = Path(environment[ERROR_FILE])
        if error.is_file():
            print(error.read_text(encoding="utf-8"), file=sys.stderr, end="", flush=True)
    return code if code in range(6) else 1  # a rank that was killed gives a code of its own


def _forwarder(launcher: int) -> Callable[[int, FrameType | None], None]:
    def forward(number: int, frame: FrameType | None) -> None:
        try:
            children = psutil.Process(launcher).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        workers = [child for child in children if _is_rank(child)]
        for process in workers or [psutil.Process(launcher)]:
            process.send_signal(number)

    return forward


def _is_rank(process: psutil.Process) -> bool:
    try:
        return "megatron_stable.pretrain" in process.cmdline() and "RANK" in process.environ()
    except psutil.Error:
        return False
