"""What is wrong with a configuration, in words for its author: one line per problem, all at once."""

import json
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, NamedTuple

from pydantic import ValidationError

from megatron_stable.config.describe import entries, sections
from megatron_stable.errors import ConfigError

# what other trainers call the same thing, where spelling alone does not lead from one to the other
_ELSEWHERE = {
    "lr": "optimizer.learning_rate",
    "min_lr": "schedule.min_learning_rate",
    "lr_decay_style": "schedule.kind",
    "train_iters": "run.steps",
    "max_steps": "run.steps",
    "save": "run.directory",
    "save_interval": "checkpoint.every",
    "num_layers": "model.layers",
    "n_layer": "model.layers",
    "hidden_size": "model.hidden",
    "n_embd": "model.hidden",
    "num_attention_heads": "model.heads",
    "n_head": "model.heads",
    "num_query_groups": "model.kv_heads",
    "seq_length": "model.sequence_length",
    "block_size": "model.sequence_length",
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "sequence_parallel": "parallel.sequence",
    "micro_batch_size": "batch.micro_size",
    "train_micro_batch_size_per_gpu": "batch.micro_size",
    "global_batch_size": "batch.global_size",
    "train_batch_size": "batch.global_size",
    "gradient_clipping": "optimizer.clip_grad",
}


class Problem(NamedTuple):
    """The keys that a problem is about, and the line that explains it."""

    keys: tuple[str, ...]
    message: str


def fail(source: str, problems: Iterable[Problem]) -> None:
    """Raise :class:`ConfigError` with one line per problem, if there are any; `source` says where they were found."""
    lines = [problem.message for problem in problems]
    if len(lines) == 1:
        raise ConfigError(f"{source}: {lines[0]}")
    if lines:
        raise ConfigError("\n  ".join([f"{source}: {len(lines)} problems", *lines]))


def explain(error: ValidationError, given: dict[str, Any]) -> list[Problem]:
    """Pydantic's findings about `given`, one problem per key, in the schema's words instead of pydantic's."""
    found: dict[str, Problem] = {}
    known = {entry.key: entry for entry in entries()}
    for fault in error.errors(include_url=False, include_context=False):
        key = ".".join(str(part) for part in fault["loc"][:2])
        if key in known and len(fault["loc"]) == 1:
            section, _, name = key.partition(".")
            found[key] = Problem((key,), f"{key}: write it as a section, `{section}:` with `{name}: ...` below it")
        elif key in known:
            entry = known[key]
            value = given[entry.section][entry.name]
            message = f"{key}: {shown(value)} is not allowed; it takes {entry.allowed}. {entry.doc}"
            found[key] = Problem((key,), message)
        elif key in sections():
            message = f"{key}: {shown(given[key])} is not a section; write lines of `name: value` below `{key}:`"
            found[key] = Problem(tuple(entry.key for entry in entries(key)), message)
        else:
            found[key] = unknown(key)
    return list(found.values())


def unknown(key: str) -> Problem:
    """The problem of an unknown key, with the nearest valid names."""
    names = nearest(key)
    if not names:
        return Problem((key,), f"{key}: unknown key; docs/configuration.md lists all keys")
    return Problem((key, *names), f"{key}: unknown key; did you mean {' or '.join(names)}?")


def nearest(key: str) -> list[str]:
    """The valid keys (or sections) that the unknown `key` most likely means, best first; empty if none is near."""
    section, _, name = key.rpartition(".")
    every = [entry.key for entry in entries()]
    if (alias := name.replace("-", "_")) in _ELSEWHERE:
        return [_ELSEWHERE[alias]]

    exact = [k for k in every if k.split(".")[1] == name]
    if exact:  # a right name in the wrong section
        return exact
    near = get_close_matches(name, [entry.name for entry in entries(section)], n=1) if section in sections() else []
    if near:
        return [f"{section}.{near[0]}"]
    if not section and (near := get_close_matches(name, list(sections()), n=1)):
        return near
    if section and (near := get_close_matches(section, list(sections()), n=1)) and near[0] != section:
        return nearest(f"{near[0]}.{name}") or near
    near = get_close_matches(name, [k.split(".")[1] for k in every], n=1, cutoff=0.7)
    return [k for k in every if near and k.split(".")[1] == near[0]]


def shown(value: Any) -> str:
    """`value` as it appears in a message: as JSON, and not too long."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except ValueError:  # a YAML alias can make a value contain itself
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
