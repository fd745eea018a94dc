"""Files of JSON objects, one to a line, that are appended to while others read them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def append(path: Path, value: Mapping[str, Any]) -> None:
    """Append an object; a last line that a crash cut off stays as it is, on a line of its own.

    Raises:
        OSError: It cannot be written.
    """
    text = json.dumps(value) + "\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())


def read(path: Path) -> Iterator[dict[str, Any] | None]:
    """The object of each line, one after another, ``None`` for a line that is no whole object; no file, no lines.

    Raises:
        OSError: It cannot be read.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        yield from map(_parse, lines)


def tail(path: Path, size: int) -> Iterator[dict[str, Any]]:
    """The whole objects among the last ``size`` bytes, in order; no file, none.

    Raises:
        OSError: It cannot be read.
    """
    if not path.is_file():
        return
    with path.open("rb") as lines:
        start = max(lines.seek(0, 2) - size, 0)
        if start:
            lines.seek(start - 1)
            lines.readline()  # the rest of a line
        else:
            lines.seek(0)
        yield from (value for value in map(_parse, lines) if value is not None)


def _parse(line: str | bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
