"""Each rank connected to its two neighbours by plain TCP, on which a word goes round when a rank leaves or is lost.

    rank 0 <── rank 1 <── rank 2 <── … <── rank n-1 <── rank 0        a rank hears the next one, and tells the previous

Two sockets per rank, however many ranks there are. The store of the process group serves to find each other.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from contextlib import suppress
from typing import Any

from megatron_stable.errors import MegatronStableError
from megatron_stable.parallel.addresses import is_loopback

MEETING = 300.0  # seconds in which neighbours, who have all joined the world, find each other


class Ring:
    """This rank's place. Collective over all ranks, of which there are two at least.

    Args:
        store: Of the process group.
        name: Of the ring; each is made once.

    Attributes:
        next, previous: Ranks.
        next_host, first_host: Names of the machines of the next rank and of rank 0.
        first_here: Whether this is the lowest rank but rank 0 on its machine, where neighbours share one.

    Raises:
        MegatronStableError: On this rank alone: a neighbour cannot be reached.
    """

    def __init__(self, store: Any, rank: int, size: int, name: str = "lifeline/at") -> None:
        self._store, self._name, self._host = store, name, socket.gethostname()
        self.next, self.previous = (rank + 1) % size, (rank - 1) % size
        token, master = secrets.token_hex(16), os.environ.get("MASTER_ADDR", "127.0.0.1")
        family, address = _address_towards(master)
        everywhere = not is_loopback(master)
        with socket.create_server(("" if everywhere else address, 0), family=family) as server:
            server.settimeout(MEETING)
            store.set(f"{name}/{rank}", json.dumps([self._host, address, server.getsockname()[1], token]))
            self._ear = self._connect(master)
            self._mouth = _accept(server, token)
        self.next_host, self.first_host = self.host(self.next), self.host(0)
        self.first_here = self.previous == 0 or self.host(self.previous) != self._host

    def host(self, rank: int) -> str:
        """Name of a rank's machine."""
        return str(self._entry(rank)[0])

    def say(self, word: int) -> None:
        """Tell the previous rank one byte; it may be gone."""
        with suppress(OSError):
            self._mouth.sendall(bytes([word]))

    def hear(self, seconds: float) -> int | None:
        """What the next rank said; ``None``: it is lost.

        Raises:
            TimeoutError: Nothing yet.
        """
        self._ear.settimeout(seconds)
        try:
            word = self._ear.recv(1)
        except TimeoutError:
            raise
        except OSError:
            return None
        return word[0] if word else None

    def close(self) -> None:
        """Close both connections."""
        self._ear.close()
        self._mouth.close()

    def _entry(self, rank: int) -> list[Any]:
        entry: list[Any] = json.loads(self._store.get(f"{self._name}/{rank}"))
        return entry

    def _connect(self, master: str) -> socket.socket:
        host, address, port, token = self._entry(self.next)
        if host != self._host and is_loopback(address):
            address = master  # only a machine that is the master's own can take the master's address for a loopback
        try:
            connection = socket.create_connection((address, port), timeout=MEETING)
            connection.sendall(token.encode())
            _keep_alive(connection)
        except OSError as error:
            raise MegatronStableError(
                f"{self._host} cannot reach rank {self.next} on {host} at {address}, port {port}: {error}; ranks of "
                "neighbouring numbers connect to each other, as NCCL's do"
            ) from None
        return connection


def _accept(server: socket.socket, token: str) -> socket.socket:
    """The connection of the one who knows the token; others may knock, too."""
    while True:
        connection, _ = server.accept()
        connection.settimeout(10.0)
        with suppress(OSError):
            if secrets.compare_digest(connection.makefile("rb").read(len(token)), token.encode()):
                connection.settimeout(None)
                _keep_alive(connection)
                return connection
        connection.close()


def _keep_alive(connection: socket.socket) -> None:
    """Have firewalls see that a connection on which nothing is said for weeks is in use. It is not given up for want of
    an answer: that is for heartbeats to judge."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 127)


def _address_towards(host: str) -> tuple[socket.AddressFamily, str]:
    """The address of this machine that another one reaches it by, if it is one through which this one reaches it."""
    family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing
        return family, probe.getsockname()[0]
