"""Ranks that wait for one that is lost all end within seconds, with its name, without a collective to tell them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.harness.ranks import Ranks
from tests.training.losing import CASES, PATIENCE
from tests.training.runs import ROOT

Results = dict[str, dict[str, Any]]
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All cases, which mostly wait, side by side."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.losing", str(tmp_path_factory.mktemp("losing"))],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "FATAL", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found: Results = json.loads(done.stdout)
    return found


SAID = {  # exit codes by rank, and the lines that are no stack
    "killed": ([1, 1, -9, 1], [f"error: rank 2 on {HOST} was lost; stopping"]),
    "first killed": ([-9, 1, 1, 1], [f"error: rank 0 on {HOST} was lost; stopping"]),
    "crashes": ([1, 1, 5, 1], []),
    "stopped": (
        [1, 1, 1, 1],
        [
            f"error: rank 2 on {HOST} fell silent",
            "ranks 0-1, 3:",
        ],
    ),
    "first stopped": (
        [1, 1, 1, 1],
        [f"error: no word from rank 0 on {HOST} for", "rank 1:"],
    ),
    "loops": (
        [1, 1, 1, 1],
        ["error: no progress for", "ranks 0-1, 3:", "rank 2:"],
    ),
    "holds": (
        [1, 1, 1, 1],
        [
            f"error: rank 2 on {HOST} fell silent",
            "ranks 0-1, 3:",
            "Timeout (",
            "Thread",
            "Thread",
            "Thread",
        ],
    ),
    "signal": ([0, 0, 0, 0], ["SIGTERM: stopped before training began"]),
    "leaves": ([0, 0, 0, 0], []),
}


QUICK = {"killed", "first killed", "crashes", "signal", "leaves"}


@pytest.mark.parametrize("case", SAID)
def test_all_ranks_end(results: Results, case: str) -> None:
    codes, said = SAID[case]
    result = results[case]
    assert result["codes"] == codes, result["printed"]
    lines = [line for line in result["printed"].splitlines() if line and not line.startswith("  ")]
    if "stopped" in case:  # the rank wakes at last, and may see that it stood still, or its timer may, before the word
        woken = [at for at, line in enumerate(lines) if "stood still for" in line or line.startswith("Timeout (")]
        del lines[min(woken, default=len(lines)) :]
    assert len(lines) == len(said), result["printed"]
    for line, begins in zip(lines, said, strict=True):
        assert line.startswith(begins), result["printed"]
    assert result["seconds"] < (PATIENCE if case in QUICK else 4 * PATIENCE)


def test_where_a_rank_loops_is_told(results: Results) -> None:
    reason, _, rest = results["loops"]["printed"].partition("\n")
    assert reason.endswith(f": rank 2 on {HOST}, for whom others wait in a collective; stopping")
    waiting, _, stuck = rest.partition("rank 2:")
    assert "in all_reduce" in waiting and "in spin" not in waiting
    assert "in spin" in stuck and "in all_reduce" not in stuck


def test_where_a_rank_holds_the_interpreter_is_told(results: Results) -> None:
    assert " in hold\n" in results["holds"]["printed"].partition("Timeout (")[2]


def test_ranks_on_both_sides_of_a_network_that_breaks_end(results: Results) -> None:
    if "cut" not in results:
        pytest.skip("networks of our own need root and ip")
    result = results["cut"]
    assert result["codes"] == [1, 1], result["printed"]
    assert result["seconds"] < 4 * PATIENCE
    errors = sorted(line for line in result["printed"].splitlines() if line.startswith("error: "))
    assert len(errors) == 2, result["printed"]
    assert errors[0].startswith(f"error: no word from rank 0 on {HOST} for"), errors
    assert errors[1].startswith(f"error: rank 1 on {HOST} fell silent"), errors


def test_every_case_is_looked_at() -> None:
    assert {*SAID, "cut"} == {*CASES}


def open_sockets() -> int:
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(str(link.readlink()).startswith("socket:") for link in links if link.is_symlink())


def cost_of_a_lifeline() -> tuple[int, Counter[str]]:
    """(sockets that it opens, requests to the store until it leaves) on this rank."""
    import time

    import torch.distributed as dist

    from megatron_stable.parallel import lifeline

    requests: Counter[str] = Counter()
    store = lifeline.key_value_store()

    class Counting:
        def __init__(self, store: Any) -> None:
            self.store = store

        def clone(self) -> Counting:
            return Counting(self.store.clone())

        def __getattr__(self, name: str) -> Any:
            def call(*args: Any) -> Any:
                requests[f"{name} {args[0]}" if name == "set" else name] += 1
                return getattr(self.store, name)(*args)

            return call

    lifeline.key_value_store = lambda: Counting(store)
    before = open_sockets()
    dist.barrier()
    line = lifeline.Lifeline(patience=2.0)
    dist.barrier()
    opened = open_sockets() - before
    requests.clear()
    time.sleep(1.0)
    line.leave()
    return opened, requests


@pytest.mark.parametrize("world", [2, 8])
def test_what_it_costs_a_rank_does_not_grow_with_the_world(ranks: Ranks, world: int) -> None:
    for rank, (opened, requests) in enumerate(ranks.run(world, cost_of_a_lifeline)):
        accepted = world if rank == 0 else 0  # by the store, which rank 0 keeps
        assert opened <= 3 + accepted
        beats = requests.pop(f"set lifeline/beat/{rank}")
        assert 3 <= beats <= 20
        per_beat = {"get", "set lifeline/word", "multi_get"} if rank == 0 else {"get"}
        assert {*requests} == per_beat
        assert all(abs(count - beats) <= 1 for count in requests.values())  # it begins to count within a round


def test_one_rank_tells_why(ranks: Ranks) -> None:
    from megatron_stable.parallel.world import first_to_crash

    assert sorted(ranks.run(3, first_to_crash)) == [False, False, True]
