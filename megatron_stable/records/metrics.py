"""The metrics of a run, ``metrics.jsonl``: one object per recorded step. docs/training.md has the keys.

The file is append-only: after a rollback or a resume, a later line for a step supersedes the earlier.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_stable.files import explain_os_errors
from megatron_stable.records import jsonl

Record = dict[str, Any]
EPOCHS = "epochs/"  # before the name of a source: how often it has been read


def read_metrics(path: Path, broken: list[int] | None = None) -> Iterator[Record]:
    """All records in the order of writing, one after another; none if there is no such file.

    Args:
        broken: Takes the numbers of the lines, from 1, that are no whole records and so are left out.

    Raises:
        DataError: The file cannot be read.
    """
    with explain_os_errors("read", path):
        for number, record in enumerate(jsonl.read(path), 1):
            if record is not None and type(record.get("step")) is int:
                yield record
            elif broken is not None:
                broken.append(number)


def latest(records: Iterable[Record]) -> list[Record]:
    """The records that are not superseded, in order of steps."""
    by_step = {record["step"]: record for record in records}
    return [by_step[step] for step in sorted(by_step)]


def batch_of(record: Record) -> tuple[tuple[int, int], ...] | None:
    """The samples of a step, [first, end) of each piece of its batch; ``None``: its record does not say."""
    pieces = record.get("samples")
    if type(record.get("data_step")) is not int or not isinstance(pieces, list) or not pieces:
        return None
    numbers = [number for piece in pieces if isinstance(piece, list) and len(piece) == 2 for number in piece]
    whole = len(numbers) == 2 * len(pieces) and all(type(number) is int and number >= 0 for number in numbers)
    return tuple((first, end) for first, end in pieces) if whole else None
