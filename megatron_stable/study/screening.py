"""A screening of data sources: which runs it trains, each with one source up-weighted, beside the plain blend.

OPT left out sources that raised the risk of instabilities, "as measured by tendency to cause spikes in gradient norms
at the 1.3B scale" (arXiv 2205.01068, §2.3). Here the small runs are a sweep: the blend as it is, the control, and one
arm for each source, whose weight is multiplied, or is 0; every one with the same seeds, so that each has a partner with
the same initial weights, and sample k of a source is the same window in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megatron_stable.config.load import load_config
from megatron_stable.config.notation import parse
from megatron_stable.config.schema import Config
from megatron_stable.data.sources import EXAMPLE, YAML, read_sources
from megatron_stable.errors import ConfigError
from megatron_stable.files import write_file
from megatron_stable.study.criteria import best_of, diverged
from megatron_stable.study.grid import Grid, read_grid
from megatron_stable.study.observations import groups, nearest
from megatron_stable.study.table import FILE, RATE, Row, read_table

CONTROL, AXIS = "control", "source"
LEAST = 20  # steps behind the warm-up, without which a run has no tail
STATES = 4  # checkpoints of a run, at equal distances; those of the control are asked about windows
FACTOR, SEEDS, WINDOWS = 4.0, 3, 128
NEAR = 0.2  # of the largest stable learning rate: nearer, the control is so wild that it hides what is looked for
SEARCHED = tuple(10 ** (k / 2) for k in range(7))  # learning rates of the search, in units of the configuration's


class Weighed(NamedTuple):
    """A source, and its weight in the blend."""

    name: str
    paths: tuple[str, ...]
    weight: float


class Asked(NamedTuple):
    """What is to be screened, and how.

    Attributes:
        directory: Everything goes there.
        base: The YAML of a proxy.
        overrides: ``section.field=value`` over it.
        sources: With their weights in the blend.
        factor: What a source's weight is multiplied by; 0: it is left out.
        seeds: Runs of each arm.
    """

    directory: Path
    base: Path
    overrides: tuple[str, ...]
    sources: tuple[Weighed, ...]
    factor: float = FACTOR
    seeds: int = SEEDS

    @property
    def config(self) -> Config:
        """Of a proxy."""
        return load_config(self.base, self.overrides)


def ask(directory: Path, base: Path, overrides: Sequence[str], factor: float = FACTOR, seeds: int = SEEDS) -> Asked:
    """Read and check what is to be screened. ConfigError, DataError: it cannot be."""
    if factor < 0 or 0 < factor <= 1:
        raise ConfigError(f"--factor {factor:g}: give more than 1 to up-weight a source, or 0 to leave it out")
    config = load_config(base, overrides)
    found = sources_of(config.data.train)
    if config.data.stages:
        raise ConfigError("data.stages is set: a screening has one blend, so give a proxy without stages")
    if config.run.steps < 15 * STATES:
        raise ConfigError(f"run.steps {config.run.steps}: a proxy of less than {15 * STATES} steps says nothing")
    left = config.run.steps - warm_up(config)
    if left < LEAST:
        raise ConfigError(
            f"run.steps {config.run.steps} leave {left} behind the warm-up, and tails of gradient norms need {LEAST}: "
            "give more run.steps, or a shorter schedule.warmup_steps"
        )
    return Asked(directory, base, tuple(overrides), found, factor, seeds)


def warm_up(config: Config) -> int:
    """The first steps of a run, which say nothing of its tail."""
    return max(config.warmup_steps, config.run.steps // 10)


def sources_of(train: Any) -> tuple[Weighed, ...]:
    """The sources of a blend, as ``data.train`` has it. ConfigError: it is none of at least two."""
    if isinstance(train, str) and Path(train).suffix in YAML:
        listed = read_sources(train)
        found = tuple(Weighed(each.name, each.paths, each.weight) for each in listed if each.weight is not None)
    elif isinstance(train, dict):
        short = [Path(prefix).name for prefix in train]
        names = short if len(set(short)) == len(short) else list(train)
        found = tuple(Weighed(name, (path,), weight) for name, (path, weight) in zip(names, train.items(), strict=True))
    else:
        found = ()
    if len(found) < 2:
        raise ConfigError(
            "data.train is no blend of two sources or more: name a .yaml of sources with weights, or {prefix: weight}; "
            f"such a file: {EXAMPLE}"
        )
    if any(source.name == CONTROL for source in found):
        raise ConfigError(f"a source is called {CONTROL}, as the plain blend is here: give it another name")
    return found


def weights(asked: Asked, arm: str) -> dict[str, float]:
    """By source, in an arm of that name."""
    return {each.name: each.weight * (asked.factor if each.name == arm else 1) for each in asked.sources}


def arms(asked: Asked, rate: float) -> Grid:
    """Write the sweep of a screening, and read it. ConfigError: there is another screening in its directory."""
    names = (CONTROL, *(each.name for each in asked.sources))
    axis: dict[str, dict[str, Any]] = {arm: {"data.train": str(_blend(asked, arm))} for arm in names}
    # and none is put off because steps are faster than a disk
    axis[CONTROL] |= {"checkpoint.keep_every": asked.config.run.steps // STATES, "checkpoint.max_failed_saves": 1}
    first = asked.config.run.seed
    return _sweep(
        asked, asked.directory, {AXIS: axis, "run.seed": [first + i for i in range(asked.seeds)]}, {RATE: rate}
    )


def search(asked: Asked) -> Grid:
    """Write the sweep of learning rates, of the plain blend, by which the edge of stability is found, and read it."""
    rates = [float(f"{asked.config.optimizer.learning_rate * factor:.3g}") for factor in SEARCHED]
    shared = {"data.train": str(_blend(asked, CONTROL))}
    return _sweep(asked, asked.directory / "edge", {RATE: rates}, shared)


def edge(rows: Sequence[Row]) -> float:
    """The largest learning rate up to which no run of these diverged. ConfigError: there is none."""
    best, rates = best_of(rows), sorted({float(row[RATE]) for row in rows})
    lost = [float(row[RATE]) for row in rows if diverged(row, best) is not False]
    stable = [rate for rate in rates if rate < min(lost, default=float("inf"))]
    if not stable:
        raise ConfigError(
            f"runs diverge or fail at learning rate {rates[0]:g} already, the smallest tried: lower it, or give --lr"
        )
    return stable[-1]


def edge_of(sweep: Path, config: Config) -> float:
    """The same of a sweep that there is: of the recipe nearest to the configuration, and the largest size."""
    found = groups(read_table(sweep), {})
    if not found:
        raise ConfigError(f"no run of {sweep} has ended: give --lr, or leave out --sweep to search")
    group, _ = nearest(found, config.by_key())
    return edge([run.row for run in group.runs if run.size == max(group.sizes)])


def _blend(asked: Asked, arm: str) -> Path:
    """The file of an arm's blend."""
    number = next((i for i, each in enumerate(asked.sources, 1) if each.name == arm), 0)
    path, given = asked.directory / "blends" / f"{number:02d}.yaml", weights(asked, arm)
    listed = {
        each.name: {"path": [str(Path(part).absolute()) for part in each.paths], "weight": given[each.name]}
        for each in asked.sources
        if given[each.name] > 0
    }
    text = yaml.safe_dump({"sources": listed}, sort_keys=False, allow_unicode=True)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ConfigError(f"{asked.directory} is a screening of other sources or weights: choose another directory")
    write_file(path, text.encode())
    return path


def _sweep(asked: Asked, directory: Path, axes: dict[str, Any], fields: dict[str, Any]) -> Grid:
    steps, guard = asked.config.run.steps, asked.config.guard
    part = steps // 4
    shared = {
        # a guard whose usual levels are known long before the end of a short run
        "guard.window": max(15, min(guard.window, part)), "guard.warmup": max(1, min(guard.warmup, part)),
        "checkpoint.every": steps // STATES, "checkpoint.keep": 1,
        "logging.every": 1, "logging.tensorboard": False, "logging.probes_every": 0, "data.validation": None,
    }  # fmt: skip
    for override in asked.overrides:
        key, _, value = override.partition("=")
        shared[key] = parse(value)
    path = directory / FILE
    text = {"directory": str(directory), "base": str(asked.base), "config": {**shared, **fields}, "axes": axes}
    write_file(path, yaml.safe_dump(text, sort_keys=False, allow_unicode=True).encode())
    return read_grid(path)
