"""What clipping rules have come to know, as a checkpoint keeps it. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_stable.persisted import Count, Persisted


class ZClipState(Persisted):
    """ZClip's statistics: the norms of the warm-up, and the moving mean and variance."""

    rule: Literal["zclip"] = "zclip"
    seen: tuple[float, ...]
    mean: float
    variance: float


class AdaGCState(Persisted):
    """AdaGC's: steps so far, and the moving mean of each parameter's norm by name; ``None``: none yet."""

    rule: Literal["adagc"] = "adagc"
    steps: Count
    gamma: dict[str, float | None]


ClippingState = Annotated[ZClipState | AdaGCState, Field(discriminator="rule")]
