"""Kill -9 of ranks that save checkpoints, many times over: ``python -m tests.checkpoint.killing FOLDER TRIALS SEED``.

A process that has imported torch, and made no thread, forks the ranks of each trial: real processes, a real store,
asynchronous saves in a row, no engine. After each trial it looks at what is left, as the next start would, and prints
it as a line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_stable.checkpoint import store
from megatron_stable.checkpoint.health import Retention
from megatron_stable.checkpoint.saver import Saver
from megatron_stable.checkpoint.state import Layout
from megatron_stable.config.schema import Config
from tests.checkpoint.stored import contents, plain_state, synthetic_states

RANKS, KEEP = 3, 2


def save_for_ever(rank: int, folder: Path, trial: int, first: int, ready: int) -> None:
    """A rank's life."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous_{trial}", rank=rank, world_size=RANKS)
    saver = Saver(folder / "checkpoints", Retention(KEEP), lambda text: None)
    dist.barrier()
    os.write(ready, b"x")
    step = first
    while True:
        saver.save(step, synthetic_states(rank, RANKS, float(step)), Layout(), Config(), plain_state(step))
        step += 1


def trial(folder: Path, number: int, chosen: random.Random, first: int) -> dict[str, Any]:
    """Start ranks, kill some of them at a random moment and the others a moment later; what was found then."""
    read, write = os.pipe()
    pids = []
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            try:
                save_for_ever(rank, folder, number, first, write)
            finally:  # a rank that lost another one
                os._exit(1)
        pids.append(pid)
    for _ in pids:
        os.read(read, 1)
    os.close(read), os.close(write)
    time.sleep(chosen.uniform(0.0, 0.15))
    chosen.shuffle(pids)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        time.sleep(chosen.choice([0.0, 0.0, 0.005]))
    for pid in pids:
        os.waitpid(pid, 0)
    root = folder / "checkpoints"
    names = sorted(path.name for path in root.iterdir())
    entries = store.entries(root)
    damaged = [entry.step for entry in entries if store.damage(entry) is not None]
    wrong = [entry.step for entry in entries if entry.step not in damaged and not _right(entry)]
    store.clean(root)
    left = [path.name for path in root.iterdir() if path.name.startswith(".step")]
    return {
        "names": names,
        "steps": [entry.step for entry in entries],
        "damaged": damaged,
        "wrong": wrong,
        "left": left,
    }


def _right(entry: store.Entry) -> bool:
    assert entry.manifest is not None
    return entry.manifest.state == plain_state(entry.step) and all(
        torch.equal(tensor, torch.full_like(tensor, entry.step + ["weight", "exp_avg", "exp_avg_sq"].index(kind)))
        for key, tensor in contents(entry.directory).items()
        for kind in [key.partition(":")[2]]
    )


def main() -> None:
    folder, trials, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    (folder / "checkpoints").mkdir()
    chosen, newest = random.Random(seed), 0
    for number in range(trials):
        found = trial(folder, number, chosen, newest + 1)
        newest = max(found["steps"], default=newest)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
