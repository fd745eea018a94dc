"""A configuration for a model and a number of tokens, with the evidence for each value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_stable.config.load import load_config
from megatron_stable.config.notation import inline
from megatron_stable.config.schema import Config
from megatron_stable.errors import ConfigError
from megatron_stable.study.evidence import At, Entry, Value, sureness
from megatron_stable.study.from_sweep import choose, read, settings
from megatron_stable.study.known import entries
from megatron_stable.study.observations import Group, nearest
from megatron_stable.study.table import RATE

LEAST_STEPS = 100


class Recommendation(NamedTuple):
    """What to train with.

    Attributes:
        config: With all values in it, checked.
        notes: What to know before it is used.
    """

    at: At
    values: tuple[Value, ...]
    config: Config
    notes: tuple[str, ...]


def recommend(
    base: Path | None,
    given: Sequence[str],
    parameters: float,
    tokens: float,
    batch_tokens: float | None = None,
    groups: Sequence[Group] = (),
) -> Recommendation:
    """The configuration for a model.

    Args:
        base: Its YAML; ``None``: the defaults.
        given: Overrides of that, as ``model.size=1b``.
        parameters: Outside embedding and head.
        tokens: To be trained on.
        batch_tokens: Of a step; default: by the size.
        groups: Of a sweep; none: by papers alone.

    Raises:
        ConfigError: The model cannot be trained like that, with the reason.
    """
    config = load_config(base, given)
    chosen: dict[str, Value] = {}
    notes: list[str] = []
    if groups:
        choice = choose(groups)
        if (recipe := choice.group.runs[0].row.get("model.recipe")) is not None:
            chosen["model.recipe"] = Value(
                "model.recipe", recipe, choice.why, choice.sure, "runs of other recipes in the sweep"
            )
            config = _with(base, given, chosen.values())
        chosen |= {value.key: value for value in settings(choice, groups, config)}
        config = _with(base, given, chosen.values())
    if config.optimizer.learning_rate <= 0:  # which stands where nothing is known of one
        raise ConfigError("optimizer.learning_rate is 0, from which nothing follows: give a positive one")
    at = At(config, parameters, tokens, batch_tokens)
    if groups:
        rate = next(entry for entry in entries(at) if entry.key == RATE).rule(at)
        read_values, notes = read(choice.group, at, rate)
        chosen |= read_values
    values = list(_values(at, chosen))
    config = _with(base, given, values)
    if groups:
        notes += _differences(choice.group, config)
    return Recommendation(at, tuple(values), config, tuple(notes))


def _values(at: At, chosen: dict[str, Value]) -> Iterator[Value]:
    """What the sweep says, and for all else what papers say."""
    left = dict(chosen)
    for entry in entries(at):
        key = "model.recipe" if entry.key == "model.qk_norm" and "model.recipe" in left else entry.key
        value = left.pop(key, None) or _by_papers(entry, at)
        at.chosen[key] = value.value
        if key == "run.steps" and value.value < LEAST_STEPS:
            raise _too_few(at, value.value)
        yield value
    yield from left.values()


def _with(base: Path | None, given: Sequence[str], values: Iterable[Value]) -> Config:
    """The configuration with these, checked."""
    wanted = {value.key: value.value for value in values}
    if "schedule.warmup_steps" in wanted:
        wanted["schedule.warmup_tokens"] = None  # whose place they take
    return load_config(base, [*given, *(f"{key}={inline(value)}" for key, value in wanted.items())])


def _differences(group: Group, config: Config) -> Iterator[str]:
    _, differ = nearest([group], config.by_key())
    if differ:
        yield f"the runs of your sweep differ from this one in {', '.join(differ)}"
    steps = {run.row.get("run.steps") for run in group.runs}
    if len(steps) == 1 and None not in steps:
        yield (
            f"they have {steps.pop():,} steps, this one {config.run.steps:,}: what that does to the best learning rate "
            "is not foretold"
        )


def _by_papers(entry: Entry, at: At) -> Value:
    evidence = "; ".join(finding.sentence(at) for finding in entry.findings) or "no source has one"
    changes = entry.changes if isinstance(entry.changes, str) else entry.changes(at)
    return Value(entry.key, entry.rule(at), evidence, sureness(entry.findings), changes)


def _too_few(at: At, steps: int) -> ConfigError:
    a_step = at.chosen["batch.global_size"] * at.config.model.sequence_length
    return ConfigError(
        f"--tokens {at.tokens:g} is too few for a schedule: {steps} of the {LEAST_STEPS} steps that it takes, of "
        f"{a_step:,} tokens each; give {LEAST_STEPS * a_step:,} or more, or a smaller --batch-tokens"
    )
