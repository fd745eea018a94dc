"""Ranks that wait for what does not come, one of which is lost: ``python -m tests.training.losing FOLDER HOW``.

Prints a line of JSON: exit codes by rank, and seconds until all had ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megatron_stable.parallel.world import Lifeline

RANKS, LOST = 4, 2


def live(rank: int, folder: Path, how: str) -> None:
    store = dist.FileStore(str(folder / "rendezvous"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(minutes=5))
    lifeline = Lifeline()
    if how == "leaves":
        time.sleep(0.2 * rank)
        lifeline.leave()
        os._exit(0)
    if rank == LOST:
        time.sleep(0.2)
        if how == "crashes":
            lifeline.crash()
            os._exit(5)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(300)  # as in a collective with a rank that is itself waiting


def main() -> None:
    pids = {}
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            try:
                live(rank, Path(sys.argv[1]), sys.argv[2])
            finally:
                os._exit(9)
        pids[pid] = rank
    began, ended = time.monotonic(), {}
    for _ in range(RANKS):
        pid, status = os.wait()
        ended[pids[pid]] = os.waitstatus_to_exitcode(status)
    print(json.dumps({"codes": [ended[rank] for rank in range(RANKS)], "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main()
