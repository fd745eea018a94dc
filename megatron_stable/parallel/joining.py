"""The ranks of one start come together: in bounded time, with a word on whom they wait for, and no stranger among them.

    rank r      reaches the store, claims its number there with a card (who, where, what differs), waits for the word
    rank 0      keeps the store, waits for all cards, says the word: go on, or why not

Strangers are ranks of an earlier start that still lives, or of another job on the same port: they meet a number that is
claimed, or other terms.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

import psutil
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatron_stable.errors import JoinError
from megatron_stable.parallel.addresses import is_loopback
from megatron_stable.parallel.heartbeat import spans
from megatron_stable.parallel.launcher import Seat, hosts

TELLS = 20.0  # seconds before, and between, words on whom a rank waits for
TURN = 0.2  # seconds between looks
LEAVES = 3.0  # seconds that rank 0 keeps the store open for others to read why the ranks do not begin
ANOTHER = "set another port: MASTER_PORT, or the launcher's --master_port"
AT = "megatron-stable/at"  # in torchrun's store
TERMS, COUNT, STRANGER, WORD, READ = "join/terms", "join/count", "join/stranger", "join/word", "join/read"


class Card(NamedTuple):
    """A rank's word on itself.

    Attributes:
        began: When its process began, seconds since 1970.
        reached: The address at which it reached rank 0's machine; empty on rank 0.
        differs: What its terms say otherwise than rank 0's, in words.
    """

    host: str
    pid: int
    began: float
    reached: str
    differs: str


class Meeting(NamedTuple):
    """Where the ranks have met.

    Attributes:
        address: Of this machine, as the others reach it.
        place: Where the store is: address and port.
    """

    store: Any
    address: str
    place: str


def meet(seat: Seat, master: str, port: int, terms: Mapping[str, Any], timeout: float) -> Meeting:
    """Find the other ranks. Collective.

    Args:
        master: Name or address of the machine of rank 0.
        terms: What must be the same on all ranks, by what it is called; as JSON has it.
        timeout: Seconds to wait for all.

    Raises:
        JoinError: Somebody did not come, is of another start, or has other terms; ``agreed`` where all ranks know.
    """
    end, place = time.monotonic() + timeout, f"{master}:{port}"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, own, reached, place = _beside_torchrun(seat, master, port, end, timeout)
    elif seat.rank == 0:
        store, own, reached = _serve(seat, port, timeout), "127.0.0.1", ""
    else:
        store, own, reached = _reach(seat, lambda: (master, port), end, timeout)
    try:
        word = _agree(store, seat, place, reached, terms, end, timeout)
    except dist.DistError:
        raise JoinError(
            f"{_self(seat)} waited for others, and hears no more of rank 0 at {place}; its output says why"
        ) from None
    if word["error"]:
        error = JoinError(word["error"])
        error.agreed = True
        raise error
    return Meeting(store, word["reached"] if is_loopback(own) and word["reached"] else own, place)


def _beside_torchrun(seat: Seat, master: str, port: int, end: float, timeout: float) -> tuple[Any, str, str, str]:
    """As :func:`_reach`, but a store of rank 0's own: torchrun's goes down with it, before a run that is left alone has
    saved. Where it is is asked again before each attempt: after a restart the last one's is still there."""
    agents, own, there = _reach(seat, lambda: (master, port), end, timeout)
    if seat.rank == 0:
        store = _serve(seat, 0, timeout)
        here = master if own == there or is_loopback(own) else own
        agents.set(AT, json.dumps([here, store.port]))
        return store, "127.0.0.1", "", f"{here}:{store.port}"

    def where() -> tuple[str, int]:
        host, chosen = json.loads(agents.get(AT)) if agents.check([AT]) else (master, 0)
        return host, chosen

    store, own, there = _reach(seat, where, end, timeout)
    return store, own, there, "{}:{}".format(*where())


def _serve(seat: Seat, port: int, timeout: float) -> Any:
    try:
        with socket.create_server(("", port)):
            pass
        return TCPStore(
            "127.0.0.1", port, seat.size, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout)
        )
    except (OSError, dist.DistError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise JoinError(
            f"port {port} of {socket.gethostname()}, where the ranks would meet, cannot be had: {reason}"
            f"{_holder(port)}; end what has it (an earlier run that still lives?), or {ANOTHER}"
        ) from None


def _holder(port: int) -> str:
    """Who listens on a port, in words, if that can be seen."""
    with suppress(psutil.Error, OSError):
        for each in psutil.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid:
                return f" (process {each.pid}: {' '.join(psutil.Process(each.pid).cmdline())[:200]})"
    return ""


def _reach(seat: Seat, where: Callable[[], tuple[str, int]], end: float, timeout: float) -> tuple[Any, str, str]:
    """(the store, this machine's address and rank 0's), once rank 0 answers."""
    tells = time.monotonic() + TELLS
    while True:
        master, port = where()
        left = max(1.0, end - time.monotonic())
        try:
            with socket.create_connection((master, port), timeout=min(10.0, left)) as line:
                own, reached = line.getsockname()[0], line.getpeername()[0]
        except OSError as error:
            why, remedy = _unreached(error, master)
        else:
            if store := _client(master, port, seat.size, max(5.0, min(30.0, left))):
                return store, own, reached
            why, remedy = "what answers there is not rank 0 of a run", f"end it, or {ANOTHER}"
        if (now := time.monotonic()) > end:
            wanted = f"rank 0 at {master}:{port} for {timeout:g} s"
            raise JoinError(f"{_self(seat)} could not reach {wanted}: {why}; {remedy}")
        if now > tells:
            tells = now + TELLS
            if seat.local == 0:
                _tell(f"{_self(seat)} waits for rank 0 at {master}:{port}: {why}")
        time.sleep(5 * TURN)


def _client(master: str, port: int, size: int, seconds: float) -> Any:
    """A connection to the store, or ``None`` if that is none; TCPStore's own would wait for its answer for ever."""
    made: list[Any] = []

    def make() -> None:
        with suppress(dist.DistError, RuntimeError):
            left = timedelta(seconds=seconds)
            made.append(TCPStore(master, port, size, is_master=False, wait_for_workers=False, timeout=left))

    thread = threading.Thread(target=make, name="join", daemon=True)
    thread.start()
    thread.join(seconds)
    return made[0] if made else None


def _unreached(error: OSError, master: str) -> tuple[str, str]:
    """Why rank 0 cannot be reached, and what to do about it."""
    why = error.strerror or str(error)
    if isinstance(error, socket.gaierror):
        return (
            why,
            f"set MASTER_ADDR to a name or address of rank 0's machine that this one knows; {master!r} is none",
        )
    if isinstance(error, ConnectionRefusedError):
        return why, "no rank 0 has begun there, or it has ended: the output of its machine says why"
    return why, "is the machine up, and does a firewall let this port through?"


def _agree(
    store: Any, seat: Seat, place: str, reached: str, terms: Mapping[str, Any], end: float, timeout: float
) -> dict[str, Any]:
    """Claim this rank's number, and hear rank 0's word."""
    if seat.rank == 0:
        store.set(TERMS, json.dumps(terms))
    _wait(store, TERMS, end)
    first = json.loads(store.get(TERMS))
    differs = [
        f"{key} is {terms.get(key)!r} there and {first.get(key)!r} on rank 0"
        for key in {**first, **terms}
        if json.loads(json.dumps(terms.get(key))) != first.get(key)
    ]
    mine = Card(socket.gethostname(), os.getpid(), psutil.Process().create_time(), reached, "; ".join(differs))
    claimed = store.compare_set(_card(seat.rank), "", json.dumps(mine)).decode()
    if Card(*json.loads(claimed)) != mine:
        other = Card(*json.loads(claimed))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(other.began))
        text = (
            f"{_self(seat)} finds its place at {place} taken by process {other.pid} on {other.host}, begun {since}: "
            f"end it, if it is an earlier run that still lives, or {ANOTHER}"
        )
        store.set(STRANGER, text)
        raise JoinError(text)
    store.add(COUNT, 1)
    if seat.rank == 0:
        word = _gather(store, seat, place, end, timeout)
        store.set(WORD, json.dumps(word))
        if word["error"]:  # this process goes, and the store with it
            until, present = time.monotonic() + LEAVES, store.add(COUNT, 0) - 1
            while store.add(READ, 0) < present and time.monotonic() < until:
                time.sleep(TURN)
        return word
    _wait(store, WORD, time.monotonic() + timeout + 2 * LEAVES)  # rank 0 may have begun just now
    word = json.loads(store.get(WORD))
    store.add(READ, 1)
    return word


def _gather(store: Any, seat: Seat, place: str, end: float, timeout: float) -> dict[str, Any]:
    """On rank 0: wait for all; the word."""
    tells = time.monotonic() + TELLS
    while store.add(COUNT, 0) < seat.size:
        if store.check([STRANGER]):
            return {"error": store.get(STRANGER).decode(), "reached": ""}
        now = time.monotonic()
        if now > min(tells, end):
            absent = _named([rank for rank in range(seat.size) if not store.check([_card(rank)])], seat.size)
            if now > end:
                error = (
                    f"{absent} of {seat.size} did not come to {place} within run.join_timeout, {timeout:g} s: the "
                    "output of their machines says why, if they began; see that each can reach that address"
                )
                return {"error": error, "reached": ""}
            _tell(f"waiting for {absent} of {seat.size} at {place}")
            tells = now + TELLS
        time.sleep(TURN)
    cards = [Card(*json.loads(each)) for each in store.multi_get([_card(rank) for rank in range(seat.size)])]
    return {
        "error": _different(cards),
        "reached": next((c.reached for c in cards[1:] if not is_loopback(c.reached)), ""),
    }


def _named(ranks: list[int], size: int) -> str:
    """Ranks with their machines, where these are known: "ranks 8-15 (node3)"."""
    known, by_host = hosts(size), dict[str, list[int]]()
    for rank in ranks:
        by_host.setdefault(known.get(rank, ""), []).append(rank)
    return ", ".join(f"{spans(own)} ({host})" if host else spans(own) for host, own in by_host.items())


def _different(cards: list[Card]) -> str:
    """Who has other terms than rank 0, in words; empty: nobody."""
    by_text: dict[str, list[int]] = {}
    for rank, card in enumerate(cards):
        if card.differs:
            by_text.setdefault(f" on {card.host}: {card.differs}", []).append(rank)
    if not by_text:
        return ""
    lines = "\n".join(f"  {spans(ranks)}{text}" for text, ranks in by_text.items())
    return f"the ranks were not started alike:\n{lines}\ngive all machines the same program and the same command"


def _wait(store: Any, key: str, end: float) -> None:
    while not store.check([key]):
        if time.monotonic() > end:
            raise dist.DistStoreError(f"no {key}")
        time.sleep(TURN)


def _card(rank: int) -> str:
    return f"join/card/{rank}"


def _self(seat: Seat) -> str:
    return f"rank {seat.rank} on {socket.gethostname()}"


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
