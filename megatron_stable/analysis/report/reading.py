"""The numbers of a run as a report shows them, read from ``metrics.jsonl`` while the run may still be writing it.

The file is read from its end to its beginning. A line holds unless one behind it is of the same step or of an earlier
one: so nothing has to be taken back, and the last line, which is read first, says how long the run is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
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
WORDS = ((b"null", b"nan"), (b"true", b"1"), (b"false", b"0"))
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
        shapes: dict[int, Shape] = {}
        holds, past, newest = _Batches(self.series), _Batches(self.superseded), dict[str, Any]()
        last = first = None
        for line in backwards(file, begin, end):
            parts = line.split(b'"')
            shape = shapes.get(len(parts))
            found = shape.numbers(parts) if shape is not None else None
            if shape is None or found is None:
                record = _record(line)
                if record is None:
                    self.broken += bool(line.strip())
                    continue
                if shape is None or shape.all != list(record):
                    shape = shapes[len(parts)] = Shape(record, parts)
                    newest = {key: value for key, value in record.items() if where(key) is None} | newest
                found = shape.numbers_of(record)
                if found is None:
                    self.broken += 1
                    continue
            step, row = found
            if first is not None and step >= first:
                past.add(step, *shape.only(SUPERSEDED, row))
                continue
            if step <= self.step and begin:
                return False
            last, first = step if last is None else last, step
            self.records += 1
            holds.add(step, shape.keys, row)
        holds.flush()
        past.flush()
        self.step, self.newest, self._end = last or self.step, self.newest | newest, end
        return True


class Shape:
    """The keys of records that are alike. Once they are known, a line needs no parser of JSON, which is half as fast.

    Attributes:
        all: The keys of a record, in order.
        keys: Those whose numbers are shown.
    """

    def __init__(self, record: Record, parts: Sequence[bytes]) -> None:
        """``parts``: of the line, between its quotation marks."""
        self.all = list(record)
        self.keys = tuple(key for key, value in record.items() if key != "step" and _is_shown(key, value))
        self._of_record = itemgetter("step", "step", *self.keys)
        self._of_cells = itemgetter(*(self.all.index(key) for key in ("step", "step", *self.keys)))
        names = parts[1::2]
        # a name that is not written as it is, and a value that is a text, are left to JSON
        self._names = names if names == [key.encode() for key in self.all] else None

    def numbers(self, parts: Sequence[bytes]) -> tuple[int, np.ndarray] | None:
        """Step and numbers of a line of this shape; ``None``: it is not, or not written as Python writes JSON."""
        if parts[1::2] != self._names or parts[0] != b"{":
            return None
        values = b"".join(parts[2::2])
        for word, number in WORDS:
            values = values.replace(word, number)
        cells = values[2:-1].split(b", : ")
        if len(cells) != len(self.all) or values[:2] != b": " or values[-1:] != b"}":
            return None
        step, *chosen = self._of_cells(cells)
        try:
            return int(step), np.array([*map(float, chosen)][1:])
        except ValueError:
            return None

    def numbers_of(self, record: Record) -> tuple[int, np.ndarray] | None:
        """Step and numbers of a record of this shape; ``None``: one is something else."""
        try:
            return record["step"], np.array(self._of_record(record)[2:], float)  # None becomes NaN
        except (TypeError, ValueError):
            return None

    def only(self, keys: Sequence[str], row: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
        """Some of the keys, as far as they are shown, and their numbers."""
        places = [i for i, key in enumerate(self.keys) if key in keys]
        return tuple(self.keys[i] for i in places), row[places]


class _Batches:
    """Numbers on their way into a table, together with others of the same keys."""

    def __init__(self, table: Thinned) -> None:
        self.table = table
        self.waiting: dict[tuple[str, ...], tuple[list[int], list[np.ndarray]]] = {}

    def add(self, step: int, keys: tuple[str, ...], row: np.ndarray) -> None:
        """Take in the numbers of a step; steps that do not fall begin another batch."""
        steps, rows = self.waiting.setdefault(keys, ([], []))
        if steps and (step >= steps[-1] or len(steps) * len(keys) >= BATCH):
            self._hand_over(keys)
            steps, rows = self.waiting.setdefault(keys, ([], []))
        if keys:
            steps.append(step)
            rows.append(row)

    def flush(self) -> None:
        """Nothing is left waiting."""
        for keys in list(self.waiting):
            self._hand_over(keys)

    def _hand_over(self, keys: tuple[str, ...]) -> None:
        steps, rows = self.waiting.pop(keys)
        if steps:
            self.table.add(steps, keys, np.stack(rows))


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
