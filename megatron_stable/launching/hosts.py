"""Machines and how many ranks each is to run, from a hostfile."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_stable.errors import ConfigError

LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(?:#.*)?")


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Ranks by host, in the order of a file in DeepSpeed's format: ``node1 slots=8``, a line for each.

    Raises:
        ConfigError: It cannot be read, or a line says something else; the line is named.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the hostfile {path} cannot be read: {error}") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = LINE.fullmatch(line.strip())
        if match is None or int(match[2]) < 1:
            raise ConfigError(f"{path}, line {number}: {line.strip()!r} is not of the form 'HOST slots=RANKS'")
        if match[1] in hosts:
            raise ConfigError(f"{path}, line {number}: {match[1]} is there twice; give it one line with all its slots")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ConfigError(f"{path} names no host; write a line 'HOST slots=RANKS' for each machine")
    return hosts


def span(names: list[str]) -> str:
    """Hosts in words: two by name, more by number."""
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
