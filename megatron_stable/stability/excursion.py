"""An excursion of a series: values above a limit, from an onset on, until they are quiet again."""

from __future__ import annotations

from math import inf
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from megatron_stable.stability.level import median

Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=0)]
Step = Annotated[int, Field(strict=True)]

QUIET = 3  # values in a row below the limit end an excursion: BLOOM's spike fell back for two steps on its way up


class Excursion(BaseModel):
    """What lasts since ``onset``; immutable, so that a state that was taken stays what it was.

    Attributes:
        kind: What it is taken for so far.
        onset: Its first step.
        level: The usual level before it; ``None`` if there was none.
        scale: The MAD before it.
        limit: A value below it is quiet; ``None``: any finite one is (too little was known before to say more).
        recent: Its last values, quiet ones included; ``None`` is one that is not finite.
        count: Values so far.
        quiet: Of the last values, how many in a row were quiet.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["spike", "rise", "divergence"]
    onset: Step
    level: Finite | None
    scale: Annotated[Finite, Field(gt=0)]
    limit: Finite | None
    recent: tuple[Finite | None, ...] = ()
    count: Count = 0
    quiet: Count = 0

    def followed_by(self, x: float | None, most: int) -> Excursion:
        """One value on; at most so many values are kept."""
        quiet = self.quiet + 1 if self.is_quiet(x) else 0
        recent = (*self.recent, x)[-most:]
        return self.model_copy(update={"recent": recent, "count": self.count + 1, "quiet": quiet})

    def is_quiet(self, x: float | None) -> bool:
        """Whether a value is below the limit."""
        return x is not None and (self.limit is None or x < self.limit)

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.quiet >= QUIET

    def heights(self) -> tuple[float, float]:
        """How far above the level the median of the earlier half of its values is, and of the later half.

        Infinite for a half of which most are not finite. The later half of one value is that value, and the earlier.
        """
        values = [inf if x is None else x - (self.level or 0.0) for x in self.recent]
        half = len(values) // 2
        return median(sorted(values[: max(half, 1)])), median(sorted(values[half:]))
