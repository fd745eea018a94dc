"""What the configuration says of training data: sources, where they are, and the blend from each sample on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megatron_stable.config.notation import parse
from megatron_stable.data.interleave import Interleave
from megatron_stable.data.stages import Paths, Stage, Stages, Stream
from megatron_stable.errors import ConfigError
from megatron_stable.files import explain_os_errors

YAML = (".yaml", ".yml")
EXAMPLE = "sources: {web: {path: data/web, weight: 0.7}, code: {path: [data/python, data/cpp], weight: 0.3}}"


@dataclass(frozen=True)
class DataSource:
    """A source: its name, the prefixes or globs whose data are one stream, and its weight in the blend, if any."""

    name: str
    paths: tuple[str, ...]
    weight: float | None


class Wanted(NamedTuple):
    """What a run is to train on: where sources are, by name, and stages by rising samples."""

    paths: dict[str, Paths]
    stages: tuple[Stage, ...]


def is_file(train: Any) -> bool:
    """Whether data are given as a YAML file of sources."""
    return isinstance(train, str | Path) and Path(train).suffix in YAML


def is_prefix(name: str) -> bool:
    """Whether a name in the configuration is that of one dataset: no glob, and no file of sources."""
    return not is_file(name) and not any(character in name for character in "*?[")


def wanted(
    train: str | Path | Sequence[str] | Mapping[str, float] | None,
    stages: Sequence[tuple[int, Mapping[str, float]]] = (),
) -> Wanted:
    """What `data.train` and `data.stages` say.

    Raises:
        DataError: A file of sources cannot be read.
        ConfigError: It is not what it should be, or nothing is named.
    """
    if is_file(train):
        listed = read_sources(str(train))
        paths: dict[str, Paths] = {each.name: each.paths for each in listed}
        weights = {} if stages else {each.name: _weight(str(train), each) for each in listed}
    elif isinstance(train, Mapping):
        paths, weights = {prefix: prefix for prefix in train}, dict(train)
    elif train is not None:
        prefixes = (str(train),) if isinstance(train, str | Path) else tuple(train)
        name = f"{prefixes[0]} and {len(prefixes) - 1} more" if len(prefixes) > 1 else prefixes[0]
        paths, weights = {name: prefixes if len(prefixes) > 1 else name}, {name: 1.0}
    elif stages:
        paths, weights = {prefix: prefix for _, weights in stages for prefix in weights}, {}
    else:
        raise ConfigError(
            "data.train is not set: name the prefix of a .bin/.idx dataset; `megatron-stable preprocess` makes one"
        )
    blends = stages or [(0, weights)]
    return Wanted(paths, tuple(_stage(sample, blend) for sample, blend in blends))


def unrecorded(
    train: str | Sequence[str] | Mapping[str, float] | None, stages: Sequence[tuple[int, Mapping[str, float]]]
) -> Stages | None:
    """What a run has trained on that noted no stages, by its configuration; `None`: on nothing."""
    if train is None and not stages:
        return None
    paths, blends = wanted(train, stages)
    return Stages.begin({name: Stream(paths=each) for name, each in paths.items()}, blends)


def read_sources(path: str | Path) -> list[DataSource]:
    """Read a file of sources; relative paths in it begin at its directory.

    Raises:
        DataError: It cannot be read.
        ConfigError: It is not what it should be: the message has the source, the value and the remedy.
    """
    with explain_os_errors("read the data sources", path):
        text = Path(path).read_text(encoding="utf-8")
    try:
        content = parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    sources = content.get("sources") if isinstance(content, dict) else None
    if not isinstance(sources, dict) or not sources or set(content) != {"sources"}:
        raise ConfigError(f"{path} does not list sources; it should look like this: {EXAMPLE}")
    found = {str(name): _source(path, str(name), entry) for name, entry in sources.items()}
    if len(found) < len(sources):  # 1 and "1" are two keys to YAML
        raise ConfigError(f"{path} has two sources of one name among {', '.join(map(str, sources))}: rename one")
    return list(found.values())


def _source(file: str | Path, name: str, entry: Any) -> DataSource:
    if not isinstance(entry, Mapping) or "path" not in entry or set(entry) - {"path", "weight"}:
        raise ConfigError(f"{file}: source {name} must have a path and a weight, and nothing else: {EXAMPLE}")
    paths, weight = entry["path"], entry.get("weight")
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not paths or not all(isinstance(each, str) and each for each in paths):
        raise ConfigError(f"{file}: source {name} has the path {entry['path']!r}; give a prefix, a glob, or a list")
    number = float(weight) if isinstance(weight, int | float) and not isinstance(weight, bool) else None
    if "weight" in entry and not (number is not None and isfinite(number) and number > 0):
        raise ConfigError(
            f"{file}: source {name} has the weight {weight!r}, it must be a number above 0; to leave it out, remove it"
        )
    return DataSource(name, tuple(str(Path(file).parent / each) for each in paths), number)


def _stage(sample: int, weights: Mapping[str, float]) -> Stage:
    Interleave(weights)  # says what is wrong with them
    return Stage(sample=sample, weights=dict(weights))


def _weight(file: str, source: DataSource) -> float:
    if source.weight is None:
        raise ConfigError(
            f"{file}: source {source.name} must have a path and a weight: {EXAMPLE}; or give weights by data.stages"
        )
    return source.weight
