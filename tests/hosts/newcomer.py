"""A newcomer's path on two fresh machines, each command with what it prints: ``python -m tests.hosts.newcomer FOLDER``.

docs/nodes.md shows what this prints. The machines share FOLDER as /srv, and know nothing of each other but names and keys.
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

ROOT = Path(__file__).parents[2]
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


def show(command: str, two: Machines, wait: bool = True) -> subprocess.Popen[str]:
    """Run a line on the first machine, and print it with its output."""
    shell = two[0].command(["bash", "-c", command], Path(SHARED))
    environment = {
        "PATH": f"{BIN}:/usr/local/bin:/usr/bin:/bin:/usr/sbin", "HOME": str(Path.home()), "LANG": "C.UTF-8",
        "PYTHONPATH": str(ROOT), "COLUMNS": "120",
    }  # fmt: skip
    print(f"$ {command}", flush=True)
    process = subprocess.Popen(
        shell, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if wait:
        output, _ = process.communicate(timeout=300)
        print(tidied(output), end="", flush=True)
        if process.returncode:
            print(f"(exit code {process.returncode})", flush=True)
    return process


def tidied(text: str) -> str:
    """Without what this machine is like."""
    text = text.replace(str(BIN.parent), "/srv/venv").replace(str(ROOT), "/srv/megatron-stable")
    return re.sub(r"\x1b\[2K|\r", "", text)


def main() -> None:
    """Print it all."""
    folder = Path(sys.argv[1])
    shared = folder / "shared"
    shared.mkdir(parents=True)
    with machines(folder / "machines") as two:
        for each in two:
            subprocess.run(each.command(["mount", "--bind", shared, SHARED]), check=True)
        (shared / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
        (shared / "config.yaml").write_text(CONFIG)
        (shared / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
        source = Path(os.__file__).parent
        (shared / "text").symlink_to(source)
        show(
            "pdsh -R ssh -w node1,node2 megatron-stable --version"
            if False
            else "ssh node2 hostname; ssh node1 hostname",
            two,
        )
        show("cat hosts", two)
        show("megatron-stable tokenizer --input text/json text/email --vocab-size 512 --output tokenizer.model", two)
        show(
            "megatron-stable preprocess --input text/json text/email text/asyncio --tokenizer tokenizer.model --output train",
            two,
        )
        show(
            "deepspeed --hostfile hosts --module megatron_stable.doctor --config config.yaml 2> /dev/null | grep -v '] '",
            two,
        )
        show("megatron-stable launch --config config.yaml --hostfile hosts --dry-run", two)
        begun = show(
            "megatron-stable launch --config config.yaml --hostfile hosts > launch.log 2>&1 &", two, wait=False
        )
        metrics = shared / "runs/first/metrics.jsonl"
        while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 60:
            time.sleep(0.5)
        begun.wait()
        show("megatron-stable status runs/first", two)
        show("megatron-stable stop runs/first", two)
        time.sleep(5)
        show("tail -n 3 launch.log", two)
        show("megatron-stable launch --config config.yaml --hostfile hosts run.steps=200 2>&1 | grep -v '] '", two)


if __name__ == "__main__":
    main()
