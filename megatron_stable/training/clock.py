"""Time spent training between records, without evaluation and saving."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Starts with the first lap, whose step warms up."""

    def __init__(self) -> None:
        self._mark: tuple[int, float] | None = None

    def lap(self, step: int) -> float | None:
        """Steps per second since the last call; ``None`` at the first."""
        now, mark = time.perf_counter(), self._mark
        self._mark = (step, now)
        return (step - mark[0]) / (now - mark[1]) if mark and step > mark[0] else None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within does not count."""
        began = time.perf_counter()
        yield
        if self._mark is not None:
            step, mark = self._mark
            self._mark = (step, mark + time.perf_counter() - began)
