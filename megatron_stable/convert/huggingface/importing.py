"""A directory of Hugging Face's as a run at step 0: weights, configuration, tokenizer; the optimizer begins anew."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from math import isclose
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from megatron_stable.checkpoint.format import (
    Index,
    Manifest,
    StoredShard,
    directory_name,
    parameters_of,
    rank_file,
    write_contents,
)
from megatron_stable.checkpoint.state import Layout, RunState
from megatron_stable.checkpoint.store import point_latest
from megatron_stable.checkpoint.tensors import CHUNK, write_tensors
from megatron_stable.config.checks import conflicts
from megatron_stable.config.schema import Config
from megatron_stable.convert.huggingface.export import STRETCH
from megatron_stable.convert.huggingface.families import FAMILIES, Family
from megatron_stable.convert.huggingface.files import Weights
from megatron_stable.convert.huggingface.function import config_of, knobs_of
from megatron_stable.convert.huggingface.names import Knobs, Part, parts
from megatron_stable.data.course import Course
from megatron_stable.errors import ConfigError, DataError
from megatron_stable.files import appearing
from megatron_stable.parallel.shards import Place, Shard
from megatron_stable.persisted import read_json
from megatron_stable.records.directory import RunDirectory
from megatron_stable.stability.events import Imported

TOKENIZERS = "tokenizer.model", "tokenizer.json"  # the first that is there
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# buffers that classes have stored, and the head where it is the embedding once more
IDLE = re.compile(
    r"(.*\.)?(attn|attention)\.(bias|masked_bias)|(.*\.)?rotary_emb\..*|lm_head\.weight|embed_out\.weight"
)
assert STRETCH % CHUNK == 0  # whole chunks have a checksum each


class Taken(NamedTuple):
    """What was read.

    Attributes:
        tokenizer: Whether there was one that `pretrain` can use.
    """

    directory: Path
    architecture: str
    parameters: int
    tokenizer: bool


def take(source: Path, output: Path, on_progress: Callable[[int, int], None] | None = None) -> Taken:
    """Make a run of a model.

    Args:
        source: Holds config.json and safetensors.
        output: The run's directory, a new one; it appears complete or not at all.
        on_progress: Called with (elements written, elements in all).

    Raises:
        ConfigError: ``output`` is not empty.
        DataError: The model is of a class or has an option that there is no knob for, or its files are not whole.
        OSError: It cannot be written.
    """
    if not source.is_dir():
        raise DataError(f"{source} is no directory; name one that holds config.json and safetensors")
    body = read_json(source / "config.json")
    family = _family(source, body)
    try:
        config = _config(family, body, source, output)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    knobs, weights = knobs_of(config), Weights(source)
    todo = list(parts(family.names(knobs), config.model, knobs))
    names = _found(weights, todo)
    total = sum(part.numel for part in todo)
    done = 0

    def pieces(part: Part) -> Iterator[Tensor]:
        nonlocal done
        for piece in _pieces(weights, names, part, knobs):
            yield piece
            done += piece.numel()
            if on_progress:
                on_progress(done, total)

    with appearing(output) as directory:
        run = RunDirectory(directory)
        checkpoint = run.checkpoints / directory_name(0)
        checkpoint.mkdir(parents=True)
        by_key = {f"{part.name}:weight": part for part in todo}
        sizes = {key: part.numel for key, part in by_key.items()}
        entry = write_tensors(checkpoint / rank_file(0), sizes, lambda key: pieces(by_key[key]))
        shards = {part.name: Shard(Place(part.shape, name=part.name), 0, part.numel) for part in todo}
        held = {0: {name: StoredShard.of(shard, ("weight",)) for name, shard in shards.items()}}
        manifest = Manifest(
            step=0,
            layout=Layout(dtype=config.precision.dtype),
            config=config.model_dump(mode="json"),
            state=RunState(optimizer_steps=0, course=Course.begin(config.batch.global_size)),
        )
        write_contents(checkpoint, Index(files={rank_file(0): entry}, parameters=parameters_of(held)), manifest)
        point_latest(run.checkpoints, 0)
        for path in source.glob("tokenizer*"):
            if path.is_file():
                shutil.copyfile(path, directory / path.name)
        run.commit(config)
        run.log(Imported(step=0, source=str(source), architecture=family.architecture))
    weights.close()
    return Taken(output, family.architecture, total, config.data.tokenizer is not None)


def _family(source: Path, body: Any) -> Family:
    kind = body.get("model_type") if isinstance(body, dict) else None
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise DataError(f"{source}: model_type {kind!r} is none that can be read; one of {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def _config(family: Family, body: dict[str, Any], source: Path, output: Path) -> Config:
    """The run's configuration: the model's, all else as it is by default."""
    knobs = family.read(body)
    try:
        config = config_of(knobs, body.get("parametrization") or {})
    except ConfigError as error:
        raise DataError(f"config.json: {error}") from None
    if wrong := [problem for problem in conflicts(config) if all(key.startswith("model.") for key in problem.keys)]:
        raise DataError(f"config.json: {wrong[0].message}")
    if differ := [name for name, value in knobs_of(config).items() if not _equal(value, knobs[name])]:
        raise DataError(f"config.json: {differ[0]} {knobs[differ[0]]!r} cannot be had with the rest of it")
    dtype = DTYPES.get(body.get("dtype") or body.get("torch_dtype") or "", "fp32")
    tokenizer = next((str(output / name) for name in TOKENIZERS if (source / name).is_file()), None)
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"directory": str(output)}),
            "precision": config.precision.model_copy(update={"dtype": dtype}),
            "data": config.data.model_copy(update={"tokenizer": tokenizer}),
        }
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return isclose(a, b, rel_tol=1e-12)
    return a == b or (isinstance(a, tuple) and list(a) == b)


def _found(weights: Weights, todo: list[Part]) -> dict[str, str]:
    """Where each tensor is that the class has, by its name; the prefix of the class may be missing.

    Raises:
        DataError: One is missing, has another shape, or there is one that the class does not have.
    """
    names: dict[str, str] = {}
    for part in todo:
        for name, shape in part.theirs.items():
            spellings = (name, name.partition(".")[2], name.replace("embed_out.", "lm_head."))
            found = next((each for each in spellings if each in weights.file_of), None)
            if found is None:
                raise DataError(f"{weights.directory} has no {name}: its files are not complete")
            if (have := weights.shape(found)) != shape:
                raise DataError(
                    f"{weights.directory}: {found} has shape {list(have or ())}, config.json says {list(shape)}"
                )
            names[name] = found
    surplus = sorted(name for name in weights.file_of.keys() - set(names.values()) if not IDLE.fullmatch(name))
    if surplus:
        raise DataError(
            f"{weights.directory} has {surplus[0]}{f' and {len(surplus) - 1} more' if surplus[1:] else ''}, which its "
            "class does not have: config.json does not belong to these weights"
        )
    return names


def _pieces(weights: Weights, names: dict[str, str], part: Part, knobs: Knobs) -> Iterator[Tensor]:
    """A tensor of ours, 1-d, in stretches, or where it has to be put together, whole."""
    if part.cut is None:
        (name,) = part.theirs
        for low in range(0, part.numel, STRETCH):
            yield weights.read(names[name], low, min(low + STRETCH, part.numel))
        return
    theirs = [weights.read(names[name]).view(shape) for name, shape in part.theirs.items()]
    yield part.cut.join(theirs, knobs).reshape(-1)
