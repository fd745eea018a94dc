"""Prompts out of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from megatron_stable.errors import DataError


class Prompt(NamedTuple):
    """A text to continue.

    Attributes:
        seed: Of its draws; ``None``: that of all.
    """

    text: str
    seed: int | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """Those of a file of JSON lines, each a string or ``{"prompt": string, "seed": integer}``; seeds may be missing.

    Raises:
        DataError: It cannot be read, has none, or has a line that is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    found = [_prompt(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise DataError(f"{path} has no prompts: give one JSON string or object per line")
    return found


def _prompt(path: Path, number: int, line: str) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}:{number}: no JSON: {error}") from None
    fields = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise DataError(f'{path}:{number}: neither a string nor {{"prompt": "..."}}')
    seed = fields.get("seed")
    if seed is not None and not (type(seed) is int and 0 <= seed < 2**63):
        raise DataError(f"{path}:{number}: seed {seed!r} is no integer from 0 to 2^63 - 1")
    return Prompt(fields["prompt"], seed)
