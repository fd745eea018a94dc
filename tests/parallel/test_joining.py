"""The ranks of a start come together in bounded time, or each machine is told why not, and strangers are kept out."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from megatron_stable.errors import ConfigError
from tests.training.networks import Networks, possible

HOST = socket.gethostname()


def be_a_rank(
    line: Connection,
    seat: tuple[int, int, int],
    network: tuple[Networks, int] | None,
    arguments: list[Any],
    stays: float,
) -> None:
    """In a process of its own: meet the others, and say what came of it."""
    from megatron_stable.parallel import addresses, joining
    from megatron_stable.parallel.launcher import Seat

    if network:
        network[0].enter(network[1])
    joining.TELLS = 1.0
    joining._tell = lambda text: line.send(("told", text))
    try:
        met = joining.meet(Seat(*seat), *arguments)
    except ConfigError as error:
        line.send(("agreed" if error.agreed else "alone", str(error)))
    else:
        line.send(("met", f"{met.address} {addresses.interface_of(met.address)}"))
        time.sleep(stays)


class Machines:
    """Processes that stand for ranks, until they are ended."""

    def __init__(self) -> None:
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["megatron_stable.parallel.joining"])
        self.pids: dict[Connection, int] = {}
        self._started: list[Any] = []

    def start(
        self, rank: int, size: int, port: int, *, master: str = "127.0.0.1", terms: dict[str, Any] | None = None,
        timeout: float = 60.0, stays: float = 0.5, network: tuple[Networks, int] | None = None,
    ) -> Connection:  # fmt: skip
        """Start a rank, alone on its machine; it says what becomes of it."""
        here, there = self._processes.Pipe()
        arguments = there, (rank, size, 0), network, [master, port, terms or {}, timeout], stays
        process = self._processes.Process(target=be_a_rank, args=arguments, daemon=True)
        process.start()
        self._started.append(process)
        self.pids[here] = process.pid or 0
        return here

    def end(self) -> None:
        for process in self._started:
            process.kill()
            process.join()


@pytest.fixture
def machines() -> Iterator[Machines]:
    made = Machines()
    yield made
    made.end()


@pytest.fixture
def port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def said(line: Connection) -> tuple[str, str]:
    """The next word of a rank."""
    assert line.poll(90.0)
    word: tuple[str, str] = line.recv()
    return word


def end_of(line: Connection) -> tuple[str, str, list[str]]:
    """How it ended, in words, and what it had told before."""
    told = []
    while (word := said(line))[0] == "told":
        told.append(word[1])
    return *word, told


def test_all_come(machines: Machines, port: int) -> None:
    ranks = [machines.start(rank, 3, port, terms={"run.steps": 7, "data.skip": [[1, 2]]}) for rank in (2, 1, 0)]
    assert [end_of(each)[:2] for each in ranks] == [("met", "127.0.0.1 lo")] * 3


def test_who_does_not_come_is_named_on_all_ranks(machines: Machines, port: int) -> None:
    ranks = [machines.start(rank, 6, port, timeout=4.0) for rank in (0, 2)]
    (how, text, told), other = (end_of(each) for each in ranks)
    assert (how, text) == other[:2]
    place = f"127.0.0.1:{port}"
    assert how == "agreed"
    assert text.startswith(f"ranks 1, 3-5 of 6 did not come to {place} within run.join_timeout, 4 s: ")
    assert f"waiting for ranks 1, 3-5 of 6 at {place}" in told


@pytest.mark.parametrize(
    ("master", "why", "remedy"),
    [
        ("127.0.0.1", "Connection refused", "no rank 0 has begun there, or it has ended"),
        ("no-such-host.invalid", "", "set MASTER_ADDR to a name or address of rank 0's machine"),
    ],
)
def test_rank_0_cannot_be_reached(machines: Machines, port: int, master: str, why: str, remedy: str) -> None:
    how, text, told = end_of(machines.start(1, 2, port, master=master, timeout=3.0))
    assert how == "alone"
    assert text.startswith(f"rank 1 on {HOST} could not reach rank 0 at {master}:{port} for 3 s: {why}")
    assert remedy in text
    assert told[0].startswith(f"rank 1 on {HOST} waits for rank 0 at {master}:{port}: {why}")


def test_the_port_is_taken(machines: Machines, port: int) -> None:
    with socket.create_server(("", port)):
        first, second = (machines.start(rank, 2, port, timeout=5.0) for rank in (0, 1))
        how, text, _ = end_of(first)
        assert how == "alone"
        assert text.startswith(f"port {port} of {HOST}, where the ranks would meet, cannot be had: Address already")
        assert f"(process {os.getpid()}: " in text and "--master_port" in text
        how, text, _ = end_of(second)
        assert how == "alone"
        assert text.startswith(
            f"rank 1 on {HOST} could not reach rank 0 at 127.0.0.1:{port} for 5 s: what answers there"
        )


def test_an_earlier_run_still_lives(machines: Machines, port: int) -> None:
    """Its rank 0 has the port, and would let ranks of the new start in; its ranks are not theirs."""
    earlier = [machines.start(rank, 2, port, stays=60) for rank in (0, 1)]
    assert [end_of(each)[0] for each in earlier] == ["met", "met"]
    first, second = (end_of(machines.start(rank, 2, port)) for rank in (0, 1))
    assert first[0] == second[0] == "alone"
    assert f"(process {machines.pids[earlier[0]]}: " in first[1]
    taken = f"rank 1 on {HOST} finds its place at 127.0.0.1:{port} taken by process {machines.pids[earlier[1]]} on"
    assert second[1].startswith(taken)


def test_a_stranger_is_turned_away(machines: Machines, port: int) -> None:
    """One that takes a place before its owner ends the start, on all ranks."""
    stranger, first = (machines.start(rank, 3, port, stays=60) for rank in (1, 0))
    while said(first)[1] != f"waiting for rank 2 of 3 at 127.0.0.1:{port}":
        pass
    how, text, _ = end_of(machines.start(1, 3, port))
    assert how == "alone"
    assert text.startswith(f"rank 1 on {HOST} finds its place")
    assert end_of(first)[:2] == end_of(stranger)[:2] == ("agreed", text)


def test_ranks_that_were_not_started_alike(machines: Machines, port: int) -> None:
    terms = {"model.hidden": 512, "run.steps": 7}
    others = {**terms, "model.hidden": 1024}
    ranks = [machines.start(rank, 4, port, terms=terms if rank < 2 else others) for rank in range(4)]
    text = (
        "the ranks were not started alike:\n"
        f"  ranks 2-3 on {HOST}: model.hidden is 1024 there and 512 on rank 0\n"
        "give all machines the same program and the same command"
    )
    assert [end_of(each)[:2] for each in ranks] == [("agreed", text)] * 4


@pytest.fixture
def networks(request: pytest.FixtureRequest) -> Iterator[Networks]:
    if not possible():
        pytest.skip("networks of our own need root and ip")
    made = Networks("join")
    yield made
    made.remove()


def test_the_name_of_rank_0_means_a_loopback_at_home(machines: Machines, port: int, networks: Networks) -> None:
    """As Debian ships /etc/hosts: rank 0's machine takes its own name for 127.0.1.1, all others for its address."""
    home, away = networks.addresses
    masters = ["127.0.1.1", "127.0.1.1", home]
    ranks = [
        machines.start(rank, 3, port, master=master, network=(networks, int(rank == 2)))
        for rank, master in enumerate(masters)
    ]
    found = [end_of(each)[:2] for each in ranks]
    assert found == [("met", f"{home} cable"), ("met", f"{home} cable"), ("met", f"{away} cable")]


def test_a_machine_that_is_cut_off(machines: Machines, port: int, networks: Networks) -> None:
    networks.cut()
    rank = machines.start(1, 2, port, master=networks.addresses[0], timeout=3.0, network=(networks, 1))
    how, text, _ = end_of(rank)
    assert how == "alone"
    assert "does a firewall let this port through?" in text


def test_who_does_not_come_is_named_with_its_machine_under_deepspeed() -> None:
    """DeepSpeed's launcher has the machines of all ranks in its command line."""
    world = base64.urlsafe_b64encode(json.dumps({"node1": [0, 1], "node2": [0, 1], "node3": [5]}).encode()).decode()
    named = "from megatron_stable.parallel.joining import _named; print(_named([1, 2, 3, 4], 5))"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {named!r}])"
    command = [sys.executable, "-c", launcher, f"--world_info={world}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "rank 1 (node1), ranks 2-3 (node2), rank 4 (node3)"


def test_the_package_is_light_where_it_only_says_no(tmp_path: Path) -> None:
    """A wrong command line is answered before anything heavy is imported."""
    check = "import sys; sys.argv[1:] = ['--config', 'none.yaml']; from megatron_stable.pretrain import main; main()"
    check += "; print(sorted({'torch', 'numpy', 'deepspeed'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr.startswith(f"error: {HOST}: ")
