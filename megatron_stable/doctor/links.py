"""How fast ranks reach each other: neighbours in pairs, then all of them together, by what training uses itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_stable.doctor.crew import Crew
from megatron_stable.doctor.finding import Finding, Verdict

TRIPS = 30  # of 8 bytes, for the latency
LARGEST = {"cpu": 2**24, "cuda": 2**28}  # bytes
LONG = 0.1  # seconds of a round trip, after which nothing larger is sent
SLOW = 1 / 3  # of the median bandwidth of pairs alike: named
REDUCED = {"cpu": (2**12, 2**20, 2**24), "cuda": (2**12, 2**24, 2**28)}  # bytes of an all-reduce
TIMES = (20, 5, 3)  # of each


class Link(NamedTuple):
    """Between neighbouring ranks.

    Attributes:
        ranks: Both.
        latency: Seconds from one to the other, of 8 bytes; the median.
        bandwidth: Bytes per second one way, with the largest message that was sent.
    """

    ranks: tuple[int, int]
    latency: float
    bandwidth: float


def check_links(crew: Crew) -> list[Finding]:
    """All findings on rank 0; collective."""
    if crew.size == 1:
        return []
    found: list[Link] = []
    for first in (0, 1):  # ranks 0-1, 2-3, ...; then 1-2, 3-4, ...
        dist.barrier()
        pair = (crew.rank - first) // 2 * 2 + first
        if first <= pair and pair + 1 < crew.size:
            found += _ping(crew, pair + 1) if crew.rank == pair else _pong(crew, pair)
    gathered: list[Any] = [None] * crew.size
    dist.gather_object(found, gathered if crew.rank == 0 else None)
    reduced = _all_reduce(crew)
    if crew.rank != 0:
        return []
    links = [Link(*link) for found in gathered for link in found]
    return [*judged(links, crew.hosts), *reduced]


def judged(links: Sequence[Link], hosts: Sequence[str]) -> list[Finding]:
    """Links within machines and between them, and those that are far slower than most of their kind."""
    findings = []
    within = [link for link in links if hosts[link.ranks[0]] == hosts[link.ranks[1]]]
    for name, kind in (("within a machine", within), ("between machines", [x for x in links if x not in within])):
        if not kind:
            continue
        latencies, bandwidths = [link.latency for link in kind], [link.bandwidth for link in kind]
        pairs = f"{len(kind)} pair{'s' * (len(kind) > 1)} of neighbours"
        text = f"{_micro(latencies)} one way, {_gigabytes(bandwidths)} ({pairs})"
        findings.append(Finding(f"links {name}", text, scope="world", numbers=_numbers(latencies, bandwidths)))
        slowest, middle = min(kind, key=lambda link: link.bandwidth), median(bandwidths)
        if len(kind) > 2 and slowest.bandwidth < SLOW * middle:
            a, b = slowest.ranks
            places = hosts[a] if hosts[a] == hosts[b] else f"{hosts[a]} and {hosts[b]}"
            text = f"ranks {a} and {b} on {places}: {_gigabytes([slowest.bandwidth])}, the median is {middle / 1e9:.3g}"
            remedy = "every step waits for it: see the cable, the switch, and what else uses them"
            findings.append(Finding(f"links {name}", text, Verdict.WARNING, remedy, scope="world"))
    return findings


def _numbers(latencies: list[float], bandwidths: list[float]) -> dict[str, float]:
    return {"latency_median": median(latencies), "latency_most": max(latencies), "bandwidth_least": min(bandwidths)}


def _micro(seconds: list[float]) -> str:
    low, high = (f"{value * 1e6:.0f}" for value in (min(seconds), max(seconds)))
    return f"{low} us" if low == high else f"{low} to {high} us"


def _gigabytes(rates: list[float]) -> str:
    low, high = (f"{value / 1e9:.3g}" for value in (min(rates), max(rates)))
    return f"{low} GB/s" if low == high else f"{low} to {high} GB/s"


def _ping(crew: Crew, peer: int) -> list[Link]:
    """Send to the next rank and get it back, in ever larger pieces until that takes long."""
    latency = median(_trip(crew, torch.zeros(8, dtype=torch.uint8, device=crew.device), peer) for _ in range(TRIPS)) / 2
    size, best = 2**16, 0.0
    while True:
        dist.send(torch.tensor([size], device=crew.device), peer)
        data = torch.zeros(size, dtype=torch.uint8, device=crew.device)
        _trip(crew, data, peer)  # the first of its size sets up buffers
        seconds = _trip(crew, data, peer)
        best = max(best, 2 * size / seconds)
        if seconds > LONG or size >= LARGEST[crew.device.type]:
            break
        size *= 4
    dist.send(torch.tensor([0], device=crew.device), peer)
    return [Link((crew.rank, peer), latency, best)]


def _trip(crew: Crew, data: torch.Tensor, peer: int) -> float:
    start = time.perf_counter()
    dist.send(data, peer)
    dist.recv(data, peer)
    _wait(crew)
    return time.perf_counter() - start


def _pong(crew: Crew, peer: int) -> list[Link]:
    """The other end of :func:`_ping`."""
    small = torch.zeros(8, dtype=torch.uint8, device=crew.device)
    for _ in range(TRIPS):
        dist.recv(small, peer)
        dist.send(small, peer)
    size = torch.zeros(1, dtype=torch.int64, device=crew.device)
    while True:
        dist.recv(size, peer)
        if not int(size):
            return []
        data = torch.empty(int(size), dtype=torch.uint8, device=crew.device)
        for _ in range(2):
            dist.recv(data, peer)
            dist.send(data, peer)


def _all_reduce(crew: Crew) -> list[Finding]:
    """Of all ranks together, in a few sizes; as bandwidth, what each rank sends over a ring per second."""
    words, numbers = list[str](), dict[str, float]()
    for size, times in zip(REDUCED[crew.device.type], TIMES, strict=True):
        data = torch.zeros(size // 4, device=crew.device)
        dist.all_reduce(data)
        _wait(crew)
        start = time.perf_counter()
        for _ in range(times):
            dist.all_reduce(data)
        _wait(crew)
        seconds = (time.perf_counter() - start) / times
        rate = 2 * (crew.size - 1) / crew.size * size / seconds
        label = f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 2**10} KiB"
        words.append(f"{label} in {seconds * 1e3:.3g} ms ({rate / 1e9:.3g} GB/s)")
        numbers |= {f"seconds_{size}": seconds}
    return [Finding("all-reduce", ", ".join(words), scope="world", numbers=numbers)]


def _wait(crew: Crew) -> None:
    if crew.on_gpu:
        torch.cuda.synchronize(crew.device)
