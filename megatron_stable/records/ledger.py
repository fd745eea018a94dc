"""The ledger: an append-only, machine-readable record of what was done to a run, when, why and by whom."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


class Ledger:
    """``ledger.jsonl`` of a run: a JSON object per line, with ``time``, ``event``, ``step`` and what belongs to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, step: int, **facts: Any) -> None:
        """Append an event at a step (0: before the first). ``facts`` are plain values."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        append_line(self.path, {"time": now, "event": event, "step": step, **facts})

    def read(self) -> list[dict[str, Any]]:
        """All events, oldest first; a line that a crash cut off is left out."""
        return read_lines(self.path)


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append a JSON object as one line; if a crash cut the last line off, it stays behind on a line of its own."""
    text = json.dumps(value) + "\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a ``.jsonl`` file, without lines that are not whole."""
    values = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            values.append(value)
    return values
