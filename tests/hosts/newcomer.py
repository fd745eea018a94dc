"""A newcomer's path on two fresh machines, each command with what it prints: ``python -m tests.hosts.newcomer FOLDER``.

docs/nodes.md shows what this prints. The machines share FOLDER as /srv, and know each other's names and keys.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.hosts.launches import BIN
from tests.hosts.machines import Machines, machines
from tests.training.runs import ROOT

SHARED = "/srv"
CONFIG = """\
run: {directory: runs/first, steps: 400}
model: {size: null, layers: 4, hidden: 64, heads: 4, sequence_length: 64, recipe: qk_norm_cap}
parallel: {tensor: 2}
batch: {global_size: 16, micro_size: 4}
data: {tokenizer: tokenizer.model, train: train}
optimizer: {learning_rate: 3.0e-3}
schedule: {warmup_steps: 20}
checkpoint: {every: 200}
guard: {mode: drop}
"""
LOGS = "grep -v '] '"  # what DeepSpeed's launchers log
INSTALLED = "for host in node1 node2; do ssh $host /srv/venv/bin/megatron-stable --version; done"
TOKENIZER = "megatron-stable tokenizer --input text/json/*.py text/email/*.py --vocab-size 512 --output tokenizer.model"
PREPROCESS = (
    "megatron-stable preprocess --input text/json/*.py text/email/*.py --tokenizer tokenizer.model --output train"
)
DOCTOR = f"deepspeed --hostfile hosts --module megatron_stable.doctor --config config.yaml 2> /dev/null | {LOGS}"
LAUNCH = "megatron-stable launch --config config.yaml --hostfile hosts"
BEFORE = ("cat hosts", INSTALLED, TOKENIZER, PREPROCESS, DOCTOR, f"{LAUNCH} --dry-run")
AFTER = ("megatron-stable status runs/first", "megatron-stable stop runs/first", "sleep 5; grep stopped launch.log")


def run(command: str, two: Machines) -> None:
    """Run a line on the first machine, and print it with its output."""
    real = command.replace("/srv/venv", str(BIN.parent))
    environment = {
        "PATH": f"{BIN}:/usr/local/bin:/usr/bin:/bin:/usr/sbin", "HOME": str(Path.home()), "LANG": "C.UTF-8",
        "PYTHONPATH": str(ROOT), "COLUMNS": "120",
    }  # fmt: skip
    print(f"$ {command}", flush=True)
    done = subprocess.run(
        two[0].command(["bash", "-c", real], Path(SHARED)),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    print(tidied(done.stdout), end=f"(exit code {done.returncode})\n" if done.returncode else "", flush=True)


def tidied(text: str) -> str:
    """Without what this machine is like."""
    text = text.replace(str(BIN.parent), "/srv/venv").replace(str(ROOT), "/srv/megatron-stable")
    return re.sub(r"\x1b\[2K|\r", "", text)


def main() -> None:
    """Print it all."""
    folder = Path(sys.argv[1])
    shared = folder / "shared"
    shared.mkdir(parents=True)
    (shared / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    (shared / "config.yaml").write_text(CONFIG)
    (shared / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    (shared / "text").symlink_to(Path(os.__file__).parent)
    metrics = shared / "runs/first/metrics.jsonl"
    (folder / "machines").mkdir()
    with machines(folder / "machines") as two:
        for each in two:
            subprocess.run(each.command(["mount", "--bind", shared, SHARED]), check=True)
        for command in BEFORE:
            run(command, two)
        run(f"{LAUNCH} > launch.log 2>&1 &", two)
        while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 60:
            time.sleep(0.5)
        for command in AFTER:
            run(command, two)
        run(f"{LAUNCH} run.steps=200 2>&1 | {LOGS}", two)


if __name__ == "__main__":
    main()
