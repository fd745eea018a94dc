"""The numbers of a run as a report shows them, read from ``metrics.jsonl`` while the run may still be writing it.

The file is read from its end to its beginning. A line holds unless one behind it is of the same step or of an earlier
one: so nothing has to be taken back, and the last line, which is read first, says how long the run is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from megatron_stable.analysis.report.thinning import Thinned
from megatron_stable.files import explain_os_errors
from megatron_stable.records.metrics import Record
from megatron_stable.stability.probes import Where, parse

BLOCK = 2**24  # bytes read at a time
BATCH = 2**18  # numbers taken in at a time
SUPERSEDED = ("loss", "grad_norm")  # what is kept of steps that a rollback or a resume went behind


@lru_cache(maxsize=2**16)
def where(key: str) -> Where | None:
    """What a key of a record is measured at; ``None``: it is no probe."""
    return parse(key)


class Curves:
    """The series of a run, thinned, as far as they have been read.

    Attributes:
        series: Those that hold, by key. Probes of single heads are left out: there may be many thousands.
        superseded: Loss and gradient norm of steps that the run went back behind, all such stretches together.
        newest: The last value of each key that is no probe.
        step: The last that was recorded; 0: none was.
        records: Lines that hold.
        broken: Lines that are no whole records.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin()

    def _begin(self) -> None:
        self.series, self.superseded = Thinned(), Thinned()
        self.newest: dict[str, Any] = {}
        self.step = self.records = self.broken = self._end = 0
        self._inode: int | None = None

    def refresh(self) -> bool:
        """Read what has been written since; says whether there was anything. DataError: it cannot be read."""
        with explain_os_errors("read", self.path):
            if not self.path.is_file():
                return False
            with self.path.open("rb") as file:
                end = _end_of_lines(file)
                if end < self._end:
                    self._begin()  # another file
                if end == self._end:
                    return False
                if not self._read(file, self._end, end):
                    self._begin()
                    self._read(file, 0, end)
        return True

    def _read(self, file: Any, begin: int, end: int) -> bool:
        """Take in the lines of a part of the file; False: they supersede what was read before."""
        holds, past = _Batches(self.series), _Batches(self.superseded)
        last = first = None
        for line in backwards(file, begin, end):
            record = _record(line)
            if record is None:
                self.broken += bool(line.strip())
                continue
            step = record["step"]
            if first is not None and step >= first:
                past.add({key: record[key] for key in ("step", *SUPERSEDED) if key in record})
                continue
            if step <= self.step and begin:
                return False
            last, first = step if last is None else last, step
            self.records += 1
            if not holds.add(record):
                self.broken += 1
        holds.flush()
        past.flush()
        self.step, self.newest, self._end = last or self.step, self.newest | holds.newest, end
        return True


class _Batches:
    """Records on their way into a table, together with others that have the same keys."""

    def __init__(self, table: Thinned) -> None:
        self.table = table
        self.shapes: dict[tuple[str, ...], _Batch] = {}
        self.newest: dict[str, Any] = {}

    def add(self, record: Record) -> bool:
        """Take in a record; False: it holds something else where others have numbers."""
        shape = tuple(record)
        if shape not in self.shapes:
            self.shapes[shape] = _Batch(record)
            # the newest of its shape, as records come from the last to the first
            self.newest = {key: value for key, value in record.items() if where(key) is None} | self.newest
        batch = self.shapes[shape]
        if not batch.keys:
            return True
        if batch.steps and (record["step"] >= batch.steps[-1] or len(batch.steps) * len(batch.keys) >= BATCH):
            batch.flush(self.table)
        return batch.add(record)

    def flush(self) -> None:
        for batch in self.shapes.values():
            batch.flush(self.table)


class _Batch:
    def __init__(self, record: Record) -> None:
        self.keys = [key for key, value in record.items() if key != "step" and _is_shown(key, value)]
        self.take = itemgetter(*self.keys, "step")  # never one alone, which would come without a tuple
        self.steps: list[int] = []
        self.rows: list[np.ndarray] = []

    def add(self, record: Record) -> bool:
        try:
            row = np.array(self.take(record)[:-1], float)  # None becomes NaN
        except (TypeError, ValueError):
            return False
        self.steps.append(record["step"])
        self.rows.append(row)
        return True

    def flush(self, table: Thinned) -> None:
        if self.steps:
            table.add(self.steps, self.keys, np.stack(self.rows))
        self.steps, self.rows = [], []


def _is_shown(key: str, value: Any) -> bool:
    found = where(key)
    return (value is None or isinstance(value, (int, float))) and (found is None or found.head is None)


def _record(line: bytes) -> Record | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and type(value.get("step")) is int else None


def _end_of_lines(file: Any) -> int:
    """Where the last whole line of a file ends; one without a line break is whole if it is a record."""
    at = size = file.seek(0, 2)
    tail = b""
    while at > 0 and b"\n" not in tail:
        begin = max(0, at - BLOCK)
        file.seek(begin)
        tail, at = file.read(at - begin) + tail, begin
    rest = tail[tail.rfind(b"\n") + 1 :]
    return size if _record(rest) is not None else size - len(rest)


def backwards(file: Any, begin: int, end: int) -> Iterator[bytes]:
    """The lines of a binary file between two places at which lines begin or end, the last one first."""
    rest: list[bytes] = []  # of a line that begins before this block, the last piece first
    while end > begin:
        start = max(begin, end - BLOCK)
        file.seek(start)
        block, end = file.read(end - start), start
        (*lines,) = block.split(b"\n")
        if len(lines) > 1:
            yield lines.pop() + b"".join(reversed(rest))
            rest = []
            while len(lines) > 1:
                yield lines.pop()
        rest.append(lines[0])
    yield b"".join(reversed(rest))
