"""Two machines, as far as the network can tell: namespaces, joined by a cable that can be cut. Needs root."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

CLONE_NEWNET = 0x40000000


def possible() -> bool:
    """Whether this machine lets this user make networks."""
    try:
        Networks("probe").remove()
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


class Networks:
    """Two of them, until they are removed.

    Args:
        name: Distinguishes them from others on this machine.
    """

    addresses = ("10.213.7.1", "10.213.7.2")

    def __init__(self, name: str) -> None:
        self.names = [f"ms-{os.getpid()}-{name}-{end}" for end in "ab"]
        try:
            for each in self.names:
                _ip("netns", "add", each)
            _ip("-n", self.names[0], "link", "add", "cable", "type", "veth", "peer", "cable", "netns", self.names[1])
            for each, address in zip(self.names, self.addresses, strict=True):
                _ip("-n", each, "addr", "add", f"{address}/24", "dev", "cable")
                _ip("-n", each, "link", "set", "cable", "up")
                _ip("-n", each, "link", "set", "lo", "up")
        except BaseException:
            self.remove()
            raise

    def enter(self, number: int) -> None:
        """Put the calling thread, and what it starts, into one of them."""
        with Path("/run/netns", self.names[number]).open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")

    def cut(self) -> None:
        """Lose all packets from now on, as a switch without power does: neither end is told."""
        for each, peer in zip(self.names, reversed(self.addresses), strict=True):
            nobody = ["lladdr", "02:00:00:00:00:01", "nud", "permanent"]
            _ip("-n", each, "neigh", "replace", peer, *nobody, "dev", "cable")

    def mend(self) -> None:
        """Undo :meth:`cut`."""
        for each, peer in zip(self.names, reversed(self.addresses), strict=True):
            _ip("-n", each, "neigh", "flush", "to", peer, "dev", "cable", "nud", "permanent")

    def remove(self) -> None:
        """Remove them."""
        for each in self.names:
            subprocess.run(["ip", "netns", "del", each], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
