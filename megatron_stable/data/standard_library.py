"""Text that every Python installation carries: the standard library's own source."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

from megatron_stable.errors import DataError
from megatron_stable.files import write_file

# other people's packages, tests, and the tables of character encodings
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}
MOST_BYTES = 12_000_000


def write_standard_library(output: Path, most_bytes: int = MOST_BYTES) -> tuple[int, int]:
    """Write the ``*.py`` files of the standard library as JSON lines, keys ``text`` and ``source``, in sorted order.

    Returns:
        (documents, bytes of text); at most ``most_bytes`` of them.

    Raises:
        DataError: This Python carries no source, or ``output`` cannot be written.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    lines, size = [], 0
    for path in sorted(root.rglob("*.py")):
        source = path.relative_to(root)
        if LEFT_OUT & set(source.parts[:-1]):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if size + len(text.encode()) > most_bytes:
            break
        if text:
            lines.append(json.dumps({"text": text, "source": source.as_posix()}))
            size += len(text.encode())
    if not lines:
        raise DataError(f"this Python carries no source of its standard library in {root}; use one that does")
    write_file(output, ("\n".join(lines) + "\n").encode())
    return len(lines), size
