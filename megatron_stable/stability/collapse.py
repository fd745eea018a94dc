"""How much of what it had learnt a run has lost again: the criterion by which sweeps call a run diverged.

Papers judge curves by eye (arXiv 2410.16682, 2309.14322); this is what the eye goes by, in numbers that do not depend
on the size of the vocabulary or of the model::

    rise = (level - lowest) / (first - lowest)

``first`` is the loss at initialisation, ``level`` the median of the last losses, ``lowest`` the lowest level so far. A
spike that falls back does not raise the median. 0: the run is where it was best. 1: all is lost.
"""

from __future__ import annotations

from math import inf, isfinite
from statistics import median

from pydantic import BaseModel, ConfigDict

RECENT = 9  # losses behind a level
LEAST = 0.05  # of the first loss: who has learnt less can hardly lose it, and the noise of a loss must not look so


class Collapse(BaseModel):
    """What is known of a run; belongs into the checkpoint.

    Attributes:
        first: The loss at initialisation.
        recent: The last losses; ``None``: not finite.
        lowest: The lowest level.
        onset: The step behind which the level has been too high; ``None``: it is not.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    first: float | None = None
    recent: tuple[float | None, ...] = ()
    lowest: float | None = None
    onset: int | None = None

    def followed_by(self, step: int, loss: float | None, part: float = inf) -> Collapse:
        """One loss on, of step ``step``; a rise of ``part`` is too high."""
        loss = None if loss is None or not isfinite(loss) else loss
        first = loss if self.first is None else self.first
        recent = (*self.recent, loss)[-RECENT:]
        lowest = first if self.lowest is None else self.lowest
        now = Collapse(first=first, recent=recent, lowest=lowest)
        if lowest is not None and now.level < lowest and len(recent) == RECENT:
            now = now.model_copy(update={"lowest": now.level})
        onset = None if now.rise < part else step if self.onset is None else self.onset
        return now.model_copy(update={"onset": onset})

    @property
    def level(self) -> float:
        """Median of the last losses, nats; infinite if half of them are not finite."""
        return median(inf if loss is None else loss for loss in self.recent)

    @property
    def rise(self) -> float:
        """The part that is lost; infinite before there was a finite loss."""
        if self.first is None or self.lowest is None:
            return inf
        return (self.level - self.lowest) / max(self.first - self.lowest, LEAST * self.first)
