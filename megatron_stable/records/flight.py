"""The flight recorder's files: what was measured in the steps before trouble began, ``flight/step_NNNNNNNN.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from megatron_stable.files import replace_file
from megatron_stable.records.callbacks import Callback
from megatron_stable.records.metrics import Record

FLIGHT = "flight"  # folder, in a run's directory


def flight_file(step: int) -> str:
    """The name of the file of trouble that began in a step."""
    return f"step_{step:08}.jsonl"


class FlightFiles(Callback):
    """Writes a file each time trouble begins: a line for each measured step, with its number and all tags.

    Where the run went back and trouble begins in the same step again, the older file is kept as ``….1.jsonl``.
    """

    def __init__(self, directory: Path) -> None:
        self.folder = directory / FLIGHT

    def flight(self, step: int, rows: Sequence[tuple[int, Record]]) -> None:
        self.folder.mkdir(exist_ok=True)
        lines = "".join(f"{json.dumps({'step': measured, **values})}\n" for measured, values in rows)
        path = self.folder / flight_file(step)
        if path.exists():  # of the same step, before the run went back
            older = next(n for n in count(1) if not path.with_suffix(f".{n}.jsonl").exists())
            path.rename(path.with_suffix(f".{older}.jsonl"))
        replace_file(path, lines.encode())
