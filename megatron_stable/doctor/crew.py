"""The ranks that take part, and the machines that they are on."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_stable.config.schema import Config
from megatron_stable.parallel.agreement import everywhere
from megatron_stable.records.owner import machine


@dataclass(frozen=True)
class Crew:
    """Who takes part, as every rank knows it.

    Attributes:
        rank: This one.
        hosts: The machine of each rank, by a name that no other machine has.
        device: Where this rank computes.
        config: Of the run to come, if one was given.
        directory: Whose file system is asked about.
    """

    rank: int
    hosts: tuple[str, ...]
    device: torch.device
    config: Config | None
    directory: Path

    @property
    def size(self) -> int:
        """Ranks."""
        return len(self.hosts)

    @property
    def host(self) -> str:
        """This rank's machine."""
        return self.hosts[self.rank]

    @property
    def local(self) -> list[int]:
        """The ranks on this machine."""
        return [rank for rank, host in enumerate(self.hosts) if host == self.host]

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that looks at its machine."""
        return self.local[0] == self.rank

    @property
    def leaders(self) -> list[int]:
        """The first rank of each machine."""
        return [rank for rank, host in enumerate(self.hosts) if self.hosts.index(host) == rank]

    @property
    def on_gpu(self) -> bool:
        """Whether ranks compute on GPUs."""
        return self.device.type == "cuda"


def muster(config: Config | None, directory: Path) -> Crew:
    """Learn who takes part. Collective."""
    cards = everywhere((socket.gethostname(), machine()))
    kernels: dict[str, list[str]] = {}  # of machines that share a name, as clones may
    for host, kernel in cards:
        if kernel not in kernels.setdefault(host, []):
            kernels[host].append(kernel)
    hosts = tuple(
        host if len(kernels[host]) == 1 else f"{host} #{kernels[host].index(kernel) + 1}" for host, kernel in cards
    )
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return Crew(dist.get_rank(), hosts, device, config, directory)
