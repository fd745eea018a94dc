"""From a YAML file and `key=value` overrides to a checked configuration, and back to YAML."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_stable.config.checks import conflicts
from megatron_stable.config.describe import accepts_text, entries, sections
from megatron_stable.config.notation import dump, parse
from megatron_stable.config.problems import Problem, explain, fail, shown, unknown
from megatron_stable.config.recipes import RECIPES
from megatron_stable.config.schema import Config
from megatron_stable.config.sizes import SIZES
from megatron_stable.errors import ConfigError

# what an override of `model.size` and of `model.recipe` takes the place of
_NAMED = {"model.size": SIZES, "model.recipe": RECIPES}


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration and check all of it that does not depend on the number of ranks.

    An override takes precedence over the file. `model.size=...` and `model.recipe=...` do so for everything that
    sizes or recipes set, so that they have their effect on a resolved file as well.

    Args:
        path: a YAML file; None: the defaults.
        overrides: `section.field=value`, where value is YAML.

    Raises:
        ConfigError: the file cannot be read, or one line for each of the problems in it and in the overrides.
    """
    config, problems = examine(path, overrides)
    fail(str(path) if path is not None else "configuration", problems)
    assert config is not None  # an invalid one has problems
    return config


def examine(path: str | Path | None = None, overrides: Sequence[str] = ()) -> tuple[Config | None, list[Problem]]:
    """The configuration and all that is wrong with it; without the configuration where it is no valid one.

    Raises:
        ConfigError: the file cannot be read.
    """
    return _examined(_read(Path(path)) if path is not None else {}, overrides)


def amended(config: Config, overrides: Sequence[str]) -> Config:
    """A configuration with overrides, which take precedence as over a file.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    changed, problems = _examined(config.model_dump(mode="json"), overrides)
    fail("configuration", problems)
    assert changed is not None
    return changed


def replaced(config: Config, values: Mapping[str, Any]) -> Config:
    """A configuration with other values, by dotted key; conflicts are not looked for.

    Raises:
        ConfigError: one line for each value that is not valid.
    """
    given = config.model_dump(mode="json")
    for key, value in values.items():
        section, _, field = key.partition(".")
        given.setdefault(section, {})[field] = value
    return parse_config(given)


def _examined(given: dict[str, Any], overrides: Sequence[str]) -> tuple[Config | None, list[Problem]]:
    problems = _override(given, overrides)
    valid = True
    try:
        config: Config | None = Config.model_validate(given)
    except ValidationError as error:
        problems += explain(error, given)
        config, valid = _without(given, problems), False
    if config is not None:
        # a conflict that follows from a value reported above is no news
        faulty = {key for problem in problems for key in problem.keys}
        if faulty & _NAMED.keys():
            faulty |= {entry.key for entry in entries("model")}
        problems += [conflict for conflict in conflicts(config) if not faulty.intersection(conflict.keys)]
    return config if valid else None, problems


def parse_config(values: dict[str, Any]) -> Config:
    """A configuration from plain values, such as a checkpoint's manifest holds; conflicts are not looked for.

    Raises:
        ConfigError: one line for each value that is not valid.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        fail("configuration", explain(error, values))
        raise


def dump_config(config: Config) -> str:
    """The whole configuration as YAML, every field resolved; :func:`load_config` makes the same of it."""
    return dump(config.model_dump(mode="json"))


def _read(path: Path) -> dict[str, Any]:
    try:
        given = parse(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:  # bytes that are no text
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: holds {shown(given)}, not the sections {', '.join(sections())}")
    # an empty section means its defaults; the copies keep overrides out of what YAML aliases share
    return {
        str(name): {str(key): value for key, value in (section or {}).items()}
        if isinstance(section, dict) or (section is None and name in sections())
        else section
        for name, section in given.items()
    }


def _override(given: dict[str, Any], overrides: Sequence[str]) -> list[Problem]:
    """Put the overrides into `given`; returns those that cannot be."""
    known = {entry.key: entry for entry in entries()}
    problems, values = [], {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            problems.append(Problem((), f"{shown(override)} is not an override; write section.field=value"))
        elif key in sections():
            problems.append(Problem((), f"{override}: {key} is a section; override its fields: {key}.field=value"))
        elif key not in known:
            problems.append(unknown(key))
        else:
            try:
                value = parse(text)
            except yaml.YAMLError as error:
                reason = getattr(error, "problem", None) or "unreadable"
                problems.append(Problem((key,), f"{override}: the value is not valid YAML: {reason}"))
                continue
            is_text = accepts_text(known[key].info) and isinstance(value, (bool, int, float))
            values[key] = text if is_text else value

    for key, named in _NAMED.items():
        if key in values and isinstance(given.get("model"), dict):
            for field in {field for fields in named.values() for field in fields}:
                given["model"].pop(field, None)
    for key, value in values.items():
        section = given.setdefault(known[key].section, {})
        if isinstance(section, dict):  # validation reports it if not
            section[known[key].name] = value
    return problems


def _without(given: dict[str, Any], problems: list[Problem]) -> Config | None:
    """The configuration with the faulty keys left out, to look for conflicts among the others."""
    faulty = {key for problem in problems for key in problem.keys}
    rest = {
        name: {field: value for field, value in section.items() if f"{name}.{field}" not in faulty}
        for name, section in given.items()
        if isinstance(section, dict) and name in sections()
    }
    try:
        return Config.model_validate(rest)
    except ValidationError:
        return None
