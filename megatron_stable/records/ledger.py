"""The ledger: an append-only, machine-readable record of what happened to a run, when, why and by whom."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

from megatron_stable.records import jsonl
from megatron_stable.stability.events import Event, parse


class Ledger:
    """``ledger.jsonl`` of a run: an event per line. docs/ledger.md has the format."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: Event) -> None:
        """Append an event, with the time. OSError: it cannot be written."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        jsonl.append(self.path, event.model_copy(update={"time": now}).line())

    def read(self) -> list[Event]:
        """All events, oldest first; a line that a crash cut off is left out. OSError: it cannot be read."""
        return [parse(line) for line in jsonl.read(self.path) if line is not None]
