"""Events of a run in progress, into ledger and logbook."""

from __future__ import annotations

from megatron_stable.records.callbacks import Callback
from megatron_stable.records.directory import RunDirectory
from megatron_stable.stability.events import Drop, Event, Spike, SpikeEnd

FREQUENT = (Drop, Spike, SpikeEnd)  # come into the logbook with the next checkpoint: a storm must not hold training up


class Chronicle(Callback):
    """Writes ``ledger.jsonl`` and ``logbook.md``."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory

    def event(self, event: Event) -> None:
        self.directory.ledger.write(event)
        if not isinstance(event, FREQUENT):
            self.directory.tell()
