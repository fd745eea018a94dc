"""Ranks that wait for one that is lost all end within seconds, with its name, without a collective to tell them."""

from __future__ import annotations

import json
import os
import re
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
        ["error: no progress for", "rank 2:", "ranks 0-1, 3:"],
    ),
    "holds": (
        [1, 1, 1, 1],
        [
            f"error: rank 2 on {HOST} fell silent",
            "ranks 0-1, 3:",
            "Timeout (",
            *["Thread"] * 4,
        ],
    ),
    "signal": ([0, 0, 0, 0], ["somebody said so: stopped before training began"]),
    "forsaken": ([1, 1, 1, 1], ["nobody is left: stopped before training began"]),
    "leaves": ([0, 0, 0, 0], []),
}


QUICK = {"killed", "first killed", "crashes", "signal", "forsaken", "leaves"}
RESUMES = "the same command goes on from the last checkpoint"
KEPT = {  # by whom, with which exit code and why
    "killed": (0, 1, f"rank 2 on {HOST} was lost; {RESUMES}"),
    "first killed": (3, 1, f"rank 0 on {HOST} was lost; {RESUMES}"),
    "crashes": (0, 5, f"rank 2 on {HOST}: ValueError: no such thing"),
    "stopped": (0, 1, f"rank 2 on {HOST} fell silent"),
    "first stopped": (3, 1, f"no word from rank 0 on {HOST} for"),
    "loops": (0, 1, "no progress for"),
    "holds": (0, 1, f"rank 2 on {HOST} fell silent"),
    "cut": (0, 1, f"rank 1 on {HOST} fell silent"),
}


@pytest.mark.parametrize("case", SAID)
def test_all_ranks_end(results: Results, case: str) -> None:
    codes, said = SAID[case]
    result = results[case]
    assert result["codes"] == codes, result["printed"]
    lines = [line for line in result["printed"].splitlines() if line and not line.startswith(("  ", "step "))]
    if "stopped" in case:  # the rank wakes at last, and may see that it stood still, or its timer may, before the word
        woken = [at for at, line in enumerate(lines) if "stood still for" in line or line.startswith("Timeout (")]
        del lines[min(woken, default=len(lines)) :]
    assert len(lines) == len(said), result["printed"]
    for line, begins in zip(lines, said, strict=True):
        assert line.startswith(begins), result["printed"]
    assert result["seconds"] < (PATIENCE if case in QUICK else 4 * PATIENCE)


def test_where_a_rank_loops_is_told(results: Results) -> None:
    reason, _, rest = results["loops"]["printed"].partition("error: ")[2].partition("\n")
    assert f": rank 2 on {HOST}, for whom others wait; stopping: its stack says where; {RESUMES}" in reason
    stuck, _, waiting = rest.partition("ranks 0-1, 3:")
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


def words(result: dict[str, Any], rank: int, kind: str) -> list[dict[str, Any]]:
    """What a rank had put on record, of a kind."""
    return [word for name, word in result["words"].get(str(rank), []) if name == kind]


@pytest.mark.parametrize("case", KEPT)
def test_why_the_run_ends_is_put_on_record(results: Results, case: str) -> None:
    """By rank 0, or by the last rank if rank 0 is lost."""
    if case not in results:
        pytest.skip("networks of our own need root and ip")
    keeper, code, reason = KEPT[case]
    (kept,) = words(results[case], keeper, "Lost")
    assert kept["exit_code"] == code
    assert kept["reason"].startswith(reason)
    assert kept["rank_0"] == {"first killed": "gone", "first stopped": "silent"}.get(case)
    assert kept["step"] > 10
    if case == "loops":
        assert "in spin" in kept["stacks"]["rank 2"] and "in all_reduce" in kept["stacks"]["ranks 0-1, 3"]


@pytest.mark.parametrize("case", ["signal", "forsaken", "leaves"])
def test_an_end_in_order_is_no_loss(results: Results, case: str) -> None:
    assert results[case]["words"] == {}


@pytest.mark.parametrize(
    ("case", "known"), [("stopped", "(silent for"), ("loops", "(in spin, losing.py:"), ("holds", "(silent for")]
)
def test_before_the_end_it_is_said_whom_the_others_wait_for(results: Results, case: str, known: str) -> None:
    lines = results[case]["printed"].partition("error: ")[0].splitlines()
    assert 1 <= len(lines) <= 4
    assert all(re.match(rf"step \d+ has taken \d s; waiting for rank 2 on {HOST} \(", line) for line in lines), lines
    assert known in lines[-1]
    (kept,) = words(results[case], 0, "Waiting")
    assert kept["ranks"] == [2] and kept["seconds"] < PATIENCE / 2
    assert kept["who"].startswith(f"rank 2 on {HOST} (")


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
