"""A clock that is off is found, and by how much, whatever the way there takes."""

from __future__ import annotations

import random
import time

import pytest
import torch.distributed as dist

from megatron_stable.doctor.clocks import Offset, Trip, check_clocks, judged, offset
from megatron_stable.doctor.finding import Finding, Verdict
from tests.doctor.rounds import crew
from tests.harness.ranks import Ranks

AHEAD = 7.25  # seconds


def test_the_offset_is_within_what_is_said() -> None:
    """The answer may come at any time between question and receipt."""
    source = random.Random(0)
    for _ in range(200):
        true, trips, now = source.uniform(-5, 5), [], 100.0
        for _ in range(8):
            there, back = source.expovariate(50), source.expovariate(50)
            trips.append(Trip(now, now + there + true, now + there + back))
            now += 1
        found = offset(trips)
        assert abs(found.seconds - true) <= found.within
        assert found.within == min(trip.heard - trip.asked for trip in trips) / 2


def test_off_by_more_than_is_known_is_a_warning() -> None:
    assert judged(Offset(1.5, 0.2)).verdict is Verdict.WARNING
    assert judged(Offset(-1.5, 0.2)).verdict is Verdict.WARNING
    assert judged(Offset(1.5, 0.6)).verdict is Verdict.OK
    assert judged(Offset(0.1, 0.001)).verdict is Verdict.OK


def clocks_on_rank(hosts: tuple[str, ...], wrong: str) -> list[Finding]:
    """On a rank: the check, on machines of which one has a clock that is ahead."""
    here = crew(hosts)
    ahead = AHEAD if hosts[dist.get_rank()] == wrong else 0.0
    return check_clocks(here, lambda: time.time() + ahead)


@pytest.mark.parametrize("wrong", ["a", "b", "c"])
def test_a_machine_whose_clock_is_off(ranks: Ranks, wrong: str) -> None:
    hosts = ("a", "a", "b", "c", "c")
    found = ranks.run(5, clocks_on_rank, hosts, wrong)
    assert [len(each) for each in found] == [0, 0, 1, 1, 0]
    expected = {"a": (-AHEAD, -AHEAD), "b": (AHEAD, 0.0), "c": (0.0, AHEAD)}[wrong]
    for (finding,), seconds in zip((found[2], found[3]), expected, strict=True):
        assert finding.numbers["ahead"] == pytest.approx(seconds, abs=finding.numbers["within"] + 1e-3)
        assert finding.numbers["within"] < 1.0
        assert finding.verdict is (Verdict.WARNING if seconds else Verdict.OK)
