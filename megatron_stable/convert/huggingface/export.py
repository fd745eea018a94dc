"""A run's checkpoint as a directory of Hugging Face's: streamed, a tensor of ours in memory at a time at most."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_stable.checkpoint.catalog import Whole
from megatron_stable.checkpoint.format import stored_config
from megatron_stable.checkpoint.reader import Reader
from megatron_stable.config.schema import Config
from megatron_stable.convert.huggingface import files
from megatron_stable.convert.huggingface.families import FAMILIES, OURS, Family, family_of
from megatron_stable.convert.huggingface.function import knobs_of
from megatron_stable.convert.huggingface.names import Knobs, Part, parts
from megatron_stable.errors import ConfigError, DataError
from megatron_stable.files import appearing, replace_file
from megatron_stable.parallel.shards import Place, Shard
from megatron_stable.persisted import package_version

SHARD_BYTES = 5 * 10**9  # of a file, at most
STRETCH = 2**26  # elements of a tensor that needs no cutting, read at a time
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Exported(NamedTuple):
    """What was written.

    Attributes:
        architecture: The class that reads it.
        files: Of weights.
        bytes: Of the tensors.
        parameters: In all.
    """

    directory: Path
    architecture: str
    dtype: str
    step: int
    files: int
    bytes: int
    parameters: int


def export(
    whole: Whole,
    output: Path,
    dtype: str | None = None,
    family: str | None = None,
    beside: Callable[[Path, Config, Family], dict[str, Any]] = lambda directory, config, family: {},
    on_progress: Callable[[int, int], None] | None = None,
    most: int = SHARD_BYTES,
) -> Exported:
    """Write a checkpoint's weights and what describes them.

    Args:
        output: A new directory; it appears complete or not at all.
        dtype: Of the weights; ``None``: what the run trained in.
        family: The class, by its ``model_type``; ``None``: the first that computes the model.
        beside: Writes the other files, a tokenizer, a card; returns keys of config.json that follow from them.
        on_progress: Called with (elements written, elements in all).
        most: Bytes of a file.

    Raises:
        ConfigError: The class does not compute the model, or ``output`` is not empty.
        DataError: The checkpoint is damaged.
        OSError: It cannot be written.
    """
    config = stored_config(whole.directory, whole.manifest)
    knobs, chosen = knobs_of(config), _chosen(config, family)
    reader = Reader(whole.directory, whole.manifest)
    dtype = dtype or config.precision.dtype
    todo = list(parts(chosen.names(knobs), config.model, knobs))
    for part in todo:
        if part.name not in reader.parameters:
            raise DataError(f"{whole.directory} has no {part.name}, which its configuration says there is")
    total, done = sum(part.numel for part in todo), 0
    shards = files.bundled((part.theirs for part in todo), files.DTYPES[dtype], most)

    def pieces() -> Iterator[Tensor]:
        nonlocal done
        for part in todo:
            for piece in _pieces(reader, part, knobs):
                yield piece
                done += piece.numel()
                if on_progress:
                    on_progress(done, total)

    with appearing(output) as directory:
        stream, size, held = pieces(), 0, {}
        for number, shapes in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else files.SINGLE
            size += files.write_file(directory / name, shapes, files.DTYPES[dtype], stream)
            held[name] = shapes
        if len(shards) > 1:
            files.write_index(directory, held, size)
        body = chosen.write(knobs) | {"dtype": TORCH_NAMES[dtype], "torch_dtype": TORCH_NAMES[dtype]}
        if chosen is OURS:
            named = {"parametrization", "base_width", "base_depth"}
            body["parametrization"] = config.optimizer.model_dump(mode="json", include=named)
        tokens: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        tokens |= beside(directory, config, chosen)
        _write_json(directory / "config.json", body | tokens | {"written_by": f"megatron-stable {package_version()}"})
        _write_json(directory / "generation_config.json", tokens)
    reader.close()
    return Exported(output, chosen.architecture, dtype, whole.step, len(shards), size, total)


def _chosen(config: Config, family: str | None) -> Family:
    knobs = knobs_of(config)
    if family is None:
        return family_of(knobs)
    if family not in FAMILIES:
        raise ConfigError(f"--class {family}: there is none; one of {', '.join(FAMILIES)}")
    if misfit := FAMILIES[family].misfit(knobs):
        fits = ", ".join(name for name, each in FAMILIES.items() if each.misfit(knobs) is None)
        raise ConfigError(
            f"--class {family}: {FAMILIES[family].architecture} has no {misfit}; what computes this model: {fits}"
        )
    return FAMILIES[family]


def _pieces(reader: Reader, part: Part, knobs: Knobs) -> Iterator[Tensor]:
    """What a tensor of ours is with them, in order, as fp32: in stretches, or where it has to be cut, whole."""
    place = Place(part.shape, name=part.name)
    factor = _sigma_factor(reader, part)
    if part.cut is None:
        for low in range(0, part.numel, STRETCH):
            stretch = reader.part("weight", Shard(place, low, min(STRETCH, part.numel - low)))
            yield stretch if factor is None else stretch * factor
        return
    whole = reader.full(part.name, "weight", part.shape)
    if factor is not None:
        whole *= factor
    yield from part.cut.split(whole, knobs)


def _sigma_factor(reader: Reader, part: Part) -> Tensor | None:
    """sigmaReparam's gamma / sigma; ``None``: the matrix is none of its."""
    inner = part.name.removesuffix(".weight") + ".reparametrize."
    if inner + "gamma" not in reader.parameters:
        return None
    width = part.shape[-1]
    u = reader.full(inner + "u", "weight", part.shape[:-1]).flatten().double()
    v = reader.full(inner + "v", "weight", (width,)).double()
    place, rows = Place(part.shape, name=part.name), prod(part.shape[:-1])
    sigma, step = torch.zeros((), dtype=torch.float64), max(1, STRETCH // width)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        some = reader.part("weight", Shard(place, first * width, (last - first) * width)).view(-1, width)
        sigma += u[first:last] @ (some @ v.float()).double()
    return (reader.full(inner + "gamma", "weight", (1,)).double() / sigma).float()


def _write_json(path: Path, body: dict[str, Any]) -> None:
    replace_file(path, (json.dumps(body, indent=2) + "\n").encode())
