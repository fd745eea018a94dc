"""Numbers as JSON has them."""

from __future__ import annotations

from math import isfinite


def finite(value: float | None) -> float | None:
    """The number; ``None`` for NaN and infinities, which JSON does not have."""
    return value if value is not None and isfinite(value) else None
