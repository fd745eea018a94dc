"""The file of a sweep: which runs it has, and the configuration of each.

::

    directory: runs/rates                   # everything goes there
    base: config.yaml                       # what all runs share: a run's configuration,
    config:                                 # and fields over it
      run: {steps: 300}
    axes:                                   # a run for each combination of
      optimizer.learning_rate: [1.0e-3, 1.0e-2, 1.0e-1]     # values of a field
      size:                                                 # and of several together, each under a label
        small: {model.layers: 2, model.hidden: 64}
        large: {model.layers: 4, model.hidden: 128}
      run.seed: [1, 2, 3]

With ``draws: 20`` (and ``seed: 1``) there are so many runs drawn from the axes instead, and an axis may be a range,
``{low: 1.0e-4, high: 1.0e-1, log: true}``. Instead of axes, ``runs`` is a list of fields for each run. ``ranks: 2``
trains each run on so many ranks. Paths are as the command line takes them.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import product
from math import exp, log
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megatron_stable.config.checks import conflicts
from megatron_stable.config.load import examine
from megatron_stable.config.notation import inline, parse
from megatron_stable.config.problems import Problem, shown
from megatron_stable.config.schema import Config
from megatron_stable.errors import ConfigError
from megatron_stable.files import explain_os_errors
from megatron_stable.study.table import RESULTS

KEYS = ("directory", "base", "config", "axes", "runs", "draws", "seed", "ranks")
# A sweep is to find out where runs fail, so no run is helped; over the base, under the sweep's own fields.
DEFAULTS = {"guard.mode": "watch", "guard.surgery": None, "guard.collapse": 0.5, "checkpoint.keep": 1}
MOST = 10_000  # runs
NAME = 120  # characters

Fields = dict[str, Any]


class Cell(NamedTuple):
    """A run of a sweep.

    Attributes:
        name: Of its directory.
        labels: By axis, for those that have labels.
        config: Its configuration.
    """

    name: str
    labels: dict[str, str]
    config: Config

    @property
    def directory(self) -> Path:
        """Of the run."""
        return Path(self.config.run.directory)


class Grid(NamedTuple):
    """A sweep as its file says.

    Attributes:
        path: The file.
        directory: Where it goes.
        ranks: Of each run.
        cells: The runs, in the order of the file: the last axis changes fastest.
    """

    path: Path
    directory: Path
    ranks: int
    cells: tuple[Cell, ...]


class _Choice(NamedTuple):
    """A value of an axis, and what it sets."""

    shown: str
    label: str | None
    fields: Fields


def read_grid(path: Path) -> Grid:
    """Read a sweep's file, and check every run of it.

    Raises:
        ConfigError: The file cannot be read, or one line for each of the problems in it.
        DataError: It cannot be read.
    """
    given = _read(path)
    problems = _misplaced(given)
    shared = _flat(given.get("config") or {}, "config", problems)
    planned = list(_planned(given, problems))
    if problems:
        raise _refused(path, problems)
    directory = Path(given["directory"])
    names = _names([values for values, *_ in planned])
    cells, found = [], Counter[str]()
    problems = [f"two runs are called {name}: name them apart" for name in _twice(names)]
    if problems:
        raise _refused(path, problems)
    for name, (_, labels, fields) in zip(names, planned, strict=True):
        fields = {**DEFAULTS, **shared, **fields, "run.directory": str(directory / "runs" / name)}
        config, wrong = examine(given.get("base"), [f"{key}={inline(value)}" for key, value in fields.items()])
        if config is not None and not wrong:
            wrong = conflicts(config, given.get("ranks", 1))
            if config.logging.every != 1:
                message = f"logging.every {config.logging.every}: a sweep goes by the loss of each step; leave it at 1"
                wrong.append(Problem(("logging.every",), message))
        found.update({problem.message for problem in wrong})
        if config is not None:
            cells.append(Cell(name, labels, config))
    many = len(planned)
    problems = [f"{message}{_where(count, many)}" for message, count in found.items()]
    if not problems:
        problems = list(_same(cells))
    if problems:
        raise _refused(path, problems)
    return Grid(path, directory, given.get("ranks", 1), tuple(cells))


def _where(count: int, many: int) -> str:
    return "" if count == many else f" (in {count} of {many} runs)"


def _refused(path: Path, problems: Sequence[str]) -> ConfigError:
    if len(problems) == 1:
        return ConfigError(f"{path}: {problems[0]}")
    return ConfigError("\n  ".join([f"{path}: {len(problems)} problems", *problems]))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; docs/sweep.md shows one")
    with explain_os_errors("read", path):
        data = path.read_bytes()
    try:
        given = parse(data)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: holds {shown(given)}, not the keys of a sweep: {', '.join(KEYS)}")
    return {str(key): value for key, value in given.items()}


def _misplaced(given: Fields) -> list[str]:
    """What is wrong with the keys of the file themselves."""
    found = [
        f"{key}: unknown key; a sweep has {', '.join(KEYS)}, and the fields of its runs are below config and axes"
        for key in given.keys() - set(KEYS)
    ]
    kinds: dict[str, tuple[type, str]] = {
        "directory": (str, "the directory of the sweep"), "base": (str, "the YAML of a run"),
        "config": (dict, "fields of a run"), "axes": (dict, "axes, each with its values"),
        "runs": (list, "a list, with the fields of each run"), "draws": (int, "how many runs are drawn"),
        "seed": (int, "the seed of what is drawn"), "ranks": (int, "the ranks of each run"),
    }  # fmt: skip
    for key, (kind, meaning) in kinds.items():
        value = given.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            found.append(f"{key}: {shown(value)} is not {meaning}")
        elif isinstance(value, int) and value < int(key != "seed"):
            found.append(f"{key}: {value} is too few")
    if given.get("directory") is None:
        found.append("directory is not set: name where the sweep goes")
    if (given.get("axes") is None) == (given.get("runs") is None):
        found.append("give either axes or runs")
    if given.get("draws") is not None and given.get("axes") is None:
        found.append("draws: there are no axes to draw from")
    if given.get("seed") is not None and given.get("draws") is None:
        found.append("seed: nothing is drawn without draws")
    return found


def _flat(given: Mapping[Any, Any], where: str, problems: list[str]) -> Fields:
    """Fields by dotted key, from these or from sections."""
    fields: Fields = {}
    for key, value in given.items() if isinstance(given, Mapping) else ():
        if "." in str(key):
            fields[str(key)] = value
        elif isinstance(value, dict):
            fields |= {f"{key}.{name}": each for name, each in value.items()}
        else:
            problems.append(f"{where}: {key} is no field; name it with its section, section.field")
    if "run.directory" in fields:
        problems.append(f"{where}: run.directory follows from the sweep's directory: leave it out")
    return fields


def _planned(given: Fields, problems: list[str]) -> Iterator[tuple[Fields, dict[str, str], Fields]]:
    """Of each run: what its name is made of, its labels, and its fields."""
    if isinstance(runs := given.get("runs"), list):
        yield from _listed(runs, problems)
        return
    axes = given.get("axes")
    if not isinstance(axes, dict):
        return
    if not axes:
        problems.append("axes: there are none")
    draws = given.get("draws") if isinstance(given.get("draws"), int) else None
    choices = {str(axis): _choices(str(axis), values, draws is not None, problems) for axis, values in axes.items()}
    if problems:
        return
    count = draws or 1
    for values in choices.values() if draws is None else ():
        count *= len(values) if isinstance(values, list) else 1
    if count > MOST:
        problems.append(f"{count} runs are more than a sweep may have, {MOST}")
        return
    for run in _drawn(choices, draws, given.get("seed") or 0) if draws else _product(choices):
        labels = {axis: choice.label for axis, choice in run.items() if choice.label is not None}
        fields: Fields = {}
        for axis, choice in run.items():
            twice = choice.fields.keys() & fields.keys()
            problems += [f"axes: {key} is set by {axis} and by another axis" for key in twice]
            fields |= choice.fields
        if problems:
            return
        yield {axis: choice.shown for axis, choice in run.items()}, labels, fields


def _listed(runs: Sequence[Any], problems: list[str]) -> Iterator[tuple[Fields, dict[str, str], Fields]]:
    if not runs:
        problems.append("runs: there are none")
    for number, run in enumerate(runs, 1):
        if not isinstance(run, dict):
            problems.append(f"runs: {shown(run)}, number {number} of the list, is not fields of a run")
            continue
        run = {str(key): value for key, value in run.items()}
        label = run.pop("name", None)
        fields = _flat(run, f"runs, {number}", problems)
        if label is not None:
            yield {"name": str(label)}, {"run": str(label)}, fields
        else:
            yield {key: _text(value) for key, value in fields.items()}, {}, fields


def _choices(axis: str, values: Any, drawn: bool, problems: list[str]) -> list[_Choice] | dict[str, Any]:
    """The values of an axis, or the range that they are drawn from."""
    if isinstance(values, list) and "." in axis:
        if not values:
            problems.append(f"axes: {axis} has no values")
        texts = [_text(value) for value in values]
        problems += [f"axes: {axis} has {text} twice" for text, count in Counter(texts).items() if count > 1]
        return [_Choice(text, None, {axis: value}) for text, value in zip(texts, values, strict=True)]
    if isinstance(values, dict) and "." not in axis:
        if axis in RESULTS:
            problems.append(f"axes: {axis} is a column of the table already: choose another name")
        if not values:
            problems.append(f"axes: {axis} has no values")
        wrong = [label for label, fields in values.items() if not isinstance(fields, dict)]
        problems += [f"axes: {axis}, {label}: {shown(values[label])} is not fields of a run" for label in wrong]
        return [
            _Choice(str(label), str(label), _flat(fields, f"axes: {axis}, {label}", problems))
            for label, fields in values.items()
            if isinstance(fields, dict)
        ]
    if isinstance(values, dict) and values.keys() <= {"low", "high", "log"}:
        low, high = (values.get(end) for end in ("low", "high"))
        numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
        if not drawn:
            problems.append(f"axes: {axis} is a range, from which to draw: say how many runs with draws")
        elif not numbers or not low < high or (values.get("log") and not low > 0):  # type: ignore[operator]
            problems.append(f"axes: {axis}: {shown(values)} is no range; give low and high, above 0 for log")
        return values
    problems.append(
        f"axes: {axis}: {shown(values)} is not what an axis has: a field, section.field, has a list of values, and any "
        "other name has labels, each with fields"
    )
    return []


def _product(choices: Mapping[str, Any]) -> Iterator[dict[str, _Choice]]:
    for combination in product(*choices.values()):
        yield dict(zip(choices, combination, strict=True))


def _drawn(choices: Mapping[str, Any], draws: int, seed: int) -> Iterator[dict[str, _Choice]]:
    """Runs drawn from the axes; more draws add to those that there are."""
    for number in range(draws):
        source = random.Random(f"{seed}, {number}")
        yield {
            axis: source.choice(values) if isinstance(values, list) else _from_range(axis, values, source)
            for axis, values in choices.items()
        }


def _from_range(axis: str, span: Mapping[str, Any], source: random.Random) -> _Choice:
    low, high = span["low"], span["high"]
    if span.get("log"):
        value: float = exp(source.uniform(log(low), log(high)))
    elif isinstance(low, int) and isinstance(high, int):
        value = source.randint(low, high)
    else:
        value = source.uniform(low, high)
    value = value if isinstance(value, int) else float(f"{value:.4g}")
    return _Choice(_text(value), None, {axis: value})


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else inline(value)


def _names(runs: Sequence[Fields]) -> list[str]:
    """Names of runs, from what each is: the same whatever other runs there are, and fit for a directory."""
    known = Counter(key.rpartition(".")[2] for key in Config().by_key())
    names = []
    for run in runs:
        short = {key.rpartition(".")[2] if known[key.rpartition(".")[2]] == 1 else key: run[key] for key in run}
        text = ",".join(value if key == "name" else f"{key}={value}" for key, value in short.items())
        plain = re.sub(r"[^\w.,=+-]+", "_", text).lstrip(".-")
        if plain != text or len(plain) > NAME or not plain:
            plain = f"{plain[:NAME]}_{sha256(text.encode()).hexdigest()[:12]}"
        names.append(plain)
    return names


def _twice(names: Sequence[str]) -> list[str]:
    """Names that are there twice, also to a file system that ignores case."""
    count = Counter(name.casefold() for name in names)
    return sorted({name for name in names if count[name.casefold()] > 1})


def _same(cells: Iterable[Cell]) -> Iterator[str]:
    """Runs that are there twice."""
    seen: dict[str, str] = {}
    for cell in cells:
        run = cell.config.run.model_copy(update={"directory": ""})
        text = cell.config.model_copy(update={"run": run}).model_dump_json()
        if text in seen:
            yield f"{cell.name} is the same run as {seen[text]}: leave one out"
        seen[text] = cell.name
