"""The metrics of a run in progress, into ``metrics.jsonl``."""

from __future__ import annotations

from pathlib import Path

from megatron_stable.records import jsonl
from megatron_stable.records.callbacks import Callback
from megatron_stable.records.metrics import Record


class MetricsFile(Callback):
    """Writes a line for each record."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def record(self, record: Record) -> None:
        jsonl.append(self.path, record)
