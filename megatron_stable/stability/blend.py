"""The event of a blend of sources that gives way to another; see :mod:`megatron_stable.data.stages`."""

from __future__ import annotations

from typing import Literal

from megatron_stable.data.stages import in_words
from megatron_stable.stability.event import Event, Step


class Blend(Event):
    """Another blend of sources begins to hold, in the batch of this step."""

    event: Literal["blend"] = "blend"
    sample: Step
    """Of the data order: the first one that it holds for."""
    shares: dict[str, float]
    """Part of the samples that comes from each source."""
    added: tuple[str, ...] = ()
    """Sources that were not in the blend before."""
    removed: tuple[str, ...] = ()
    """Sources that are not in it any more."""
    read: dict[str, int]
    """Samples of each source that were taken before, from which it goes on; what was skipped is among them."""

    def words(self) -> str:
        read = {name: self.read.get(name, 0) for name in self.added}
        notes = {name: f" (from its sample {count} on)" if count else " (new)" for name, count in read.items()}
        gone = f"; no more of {', '.join(self.removed)}" if self.removed else ""
        return f"another blend from sample {self.sample} on: {in_words(self.shares, notes)}{gone}"
