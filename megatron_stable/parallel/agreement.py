"""All ranks agree before any of them acts."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from megatron_stable.errors import MegatronStableError


@contextmanager
def together() -> Iterator[None]:
    """If the body raises a user's error on any rank, every rank raises the first of them, as ``agreed``. Collective."""
    mine: MegatronStableError | None = None
    try:
        yield
    except MegatronStableError as error:
        mine = error
    verdicts: list[tuple[type[MegatronStableError], str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(verdicts, (type(mine), str(mine)) if mine else None)
    for verdict in verdicts:
        if verdict is not None:
            agreed = verdict[0](verdict[1])
            agreed.agreed = True
            raise agreed from None


class StopSignal:
    """SIGTERM and SIGINT as a wish to stop before the next step, agreed upon by all ranks.

    The question goes around while the step computes, over a CPU group of its own, so it costs the step nothing.
    Collective.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo")
        self.received: str | None = None
        self._wish = torch.zeros((), dtype=torch.int32)
        self._work: dist.Work | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def ask(self) -> None:
        """Start asking."""
        self._wish.fill_(self.received is not None)
        self._work = dist.all_reduce(self._wish, group=self.group, async_op=True)

    def agreed(self) -> bool:
        """Whether any rank had received a signal when it asked."""
        assert self._work is not None
        self._work.wait()
        return bool(self._wish)
