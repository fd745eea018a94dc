"""What is told of a run in progress: a callback sees every record and every event, and writes them somewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

from megatron_stable.records.metrics import Record
from megatron_stable.stability.events import Event


class Callback:
    """The hooks of a run, in order of their calls; each does nothing unless it is overridden. OSError: no room, say."""

    def event(self, event: Event) -> None:
        """Something happened."""

    def record(self, record: Record) -> None:
        """After a step that is logged or evaluated; docs/training.md has the keys."""

    def flight(self, step: int, rows: Sequence[tuple[int, Record]]) -> None:
        """Trouble began in a step: (step, values by tag) of the measured steps up to it."""

    def histograms(self, step: int, counts: Mapping[str, Sequence[float]]) -> None:
        """Of a step, by tag: how many elements have a magnitude in each power of two, from 2^-32 on."""

    def rewind(self, step: int) -> None:
        """After the run went back to a checkpoint of ``step``: records of later steps come anew."""

    def message(self, text: str) -> None:
        """Something to tell the user: a checkpoint, or a warning, which begins with that word."""

    def ended(self, text: str) -> None:
        """How the run ended, in words."""

    def close(self) -> None:
        """At the end of the run, however it ends."""


class Callbacks(Callback):
    """Several callbacks as one, of which none can stop the run: what cannot be written is reported once.

    Only rank 0's has any.
    """

    def __init__(self, *callbacks: Callback) -> None:
        self.callbacks = [*callbacks]
        self.failed: set[Callback] = set()

    def event(self, event: Event) -> None:
        self._each(lambda callback: callback.event(event))

    def record(self, record: Record) -> None:
        self._each(lambda callback: callback.record(record))

    def flight(self, step: int, rows: Sequence[tuple[int, Record]]) -> None:
        self._each(lambda callback: callback.flight(step, rows))

    def histograms(self, step: int, counts: Mapping[str, Sequence[float]]) -> None:
        self._each(lambda callback: callback.histograms(step, counts))

    def rewind(self, step: int) -> None:
        self._each(lambda callback: callback.rewind(step))

    def message(self, text: str) -> None:
        for callback in self.callbacks:
            callback.message(text)

    def ended(self, text: str) -> None:
        for callback in self.callbacks:
            callback.ended(text)

    def close(self) -> None:
        for callback in self.callbacks:
            try:
                callback.close()
            except OSError as error:
                print(f"warning: {type(callback).__name__}: {error}", file=sys.stderr)

    def _each(self, call: Callable[[Callback], None]) -> None:
        for callback in self.callbacks:
            try:
                call(callback)
                self.failed.discard(callback)
            except OSError as error:
                if callback not in self.failed:
                    self.failed.add(callback)
                    self.message(f"warning: {type(callback).__name__} cannot write, training goes on: {error}")
