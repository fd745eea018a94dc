"""How far the machines' clocks are apart: Cristian's algorithm (doi 10.1007/BF01784024).

A machine asks rank 0 for the time and takes the answer for that of the middle of the round trip. It is off by half of
that at most, so of several the shortest counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_stable.doctor.crew import Crew
from megatron_stable.doctor.finding import Finding, Verdict
from megatron_stable.parallel.world import key_value_store

TRIPS = 8
MOST = 1.0  # seconds: records of a run carry times, and so do files


class Trip(NamedTuple):
    """A question and its answer: seconds, by the asker's clock when it asked and heard, and by rank 0's between."""

    asked: float
    answered: float
    heard: float


class Offset(NamedTuple):
    """Seconds that rank 0's clock is ahead of one's own, give or take ``within``."""

    seconds: float
    within: float


def offset(trips: Sequence[Trip]) -> Offset:
    """By the shortest round trip."""
    best = min(trips, key=lambda trip: trip.heard - trip.asked)
    return Offset(best.answered - (best.asked + best.heard) / 2, (best.heard - best.asked) / 2)


def measure(crew: Crew, clock: Callable[[], float] = time.time) -> Offset:
    """Of this rank to rank 0, which answers one machine after another; of others than leaders nothing. Collective."""
    store = key_value_store()
    if crew.rank == 0:
        for leader in crew.leaders[1:]:
            for trip in range(TRIPS):
                store.get(f"doctor/clock/{leader}/{trip}/asked")
                store.set(f"doctor/clock/{leader}/{trip}/answered", repr(clock()))
    elif crew.leads:
        return offset([_ask(store, f"doctor/clock/{crew.rank}/{trip}", clock) for trip in range(TRIPS)])
    return Offset(0.0, 0.0)


def _ask(store: Any, key: str, clock: Callable[[], float]) -> Trip:
    asked = clock()
    store.set(f"{key}/asked", "")
    answered = float(store.get(f"{key}/answered"))
    return Trip(asked, answered, clock())


def check_clocks(crew: Crew, clock: Callable[[], float] = time.time) -> list[Finding]:
    """Each machine's clock against rank 0's; findings on leaders, but that of rank 0's machine. Collective."""
    if len(crew.leaders) == 1:
        return []
    dist.barrier()
    found = measure(crew, clock)
    return [judged(found)] if crew.leads and crew.rank != 0 else []


def judged(found: Offset) -> Finding:
    """What an offset means."""
    text = "{apart:.3f} s from rank 0's clock, give or take {within:.3f} s"
    numbers = {"apart": abs(found.seconds), "ahead": -found.seconds, "within": found.within}
    if abs(found.seconds) - found.within > MOST:
        remedy = "records of the run would contradict each other: start an NTP client (chrony, systemd-timesyncd)"
        return Finding("clocks", text, Verdict.WARNING, remedy, numbers)
    return Finding("clocks", text, numbers=numbers)
