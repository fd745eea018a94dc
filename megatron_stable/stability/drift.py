"""A rise of the loss that is too slow to stand out: the median of a few losses is above the lowest it has been. Losses
that do stand out are a spike's, and left out.

So little evidence would raise false alarms by itself; it is enough to ask for a second opinion, which costs little.
"""

from __future__ import annotations

from statistics import median

from pydantic import BaseModel, ConfigDict


class DriftState(BaseModel):
    """What is known; belongs into the checkpoint.

    Attributes:
        recent: The last losses.
        lowest: The lowest median, and ``since`` the last step behind it.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    recent: tuple[float, ...] = ()
    lowest: float | None = None
    since: int = 0

    def followed_by(self, step: int, loss: float, patience: int) -> DriftState:
        """One finite loss on. A rise must have stayed for ``patience`` steps to raise the median."""
        length = 2 * patience - 1
        recent = (*self.recent, loss)[-length:]
        if len(recent) == length and (self.lowest is None or median(recent) < self.lowest):
            return DriftState(recent=recent, lowest=median(recent), since=step)
        return DriftState(recent=recent, lowest=self.lowest, since=self.since)

    def onset(self, part: float) -> int | None:
        """Where a rise by more than this part of the lowest began; ``None``: there is none."""
        rises = self.lowest is not None and median(self.recent) > (1 + part) * self.lowest
        return self.since if rises else None

    def settled(self) -> DriftState:
        """The loss of today is the usual one from here on."""
        return DriftState(recent=self.recent)
