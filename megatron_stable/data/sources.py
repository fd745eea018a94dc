"""A YAML file of data sources: names, where they are, weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from megatron_stable.errors import ConfigError
from megatron_stable.files import explain_os_errors

EXAMPLE = "sources: {web: {path: data/web, weight: 0.7}, code: {path: [data/python, data/cpp], weight: 0.3}}"


@dataclass(frozen=True)
class DataSource:
    """A source: its name, the prefixes or globs whose data are one stream, and its weight in the blend."""

    name: str
    paths: tuple[str, ...]
    weight: float


def read_sources(path: str | Path) -> list[DataSource]:
    """Read a file of sources; relative paths in it begin at its directory.

    Raises:
        DataError: It cannot be read.
        ConfigError: It is not what it should be: the message has the source, the value and the remedy.
    """
    with explain_os_errors("read the data sources", path):
        text = Path(path).read_text(encoding="utf-8")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    sources = content.get("sources") if isinstance(content, dict) else None
    if not isinstance(sources, dict) or not sources or set(content) != {"sources"}:
        raise ConfigError(f"{path} does not list sources; it should look like this: {EXAMPLE}")
    return [_source(path, str(name), entry) for name, entry in sources.items()]


def _source(file: str | Path, name: str, entry: Any) -> DataSource:
    if not isinstance(entry, Mapping) or set(entry) != {"path", "weight"}:
        raise ConfigError(f"{file}: source {name} must have a path and a weight, and nothing else: {EXAMPLE}")
    paths, weight = entry["path"], entry["weight"]
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not paths or not all(isinstance(each, str) and each for each in paths):
        raise ConfigError(f"{file}: source {name} has the path {entry['path']!r}; give a prefix, a glob, or a list")
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not (number and isfinite(weight) and weight > 0):
        raise ConfigError(
            f"{file}: source {name} has the weight {weight!r}, it must be a number above 0; to leave it out, remove it"
        )
    return DataSource(name, tuple(str(Path(file).parent / each) for each in paths), float(weight))
