"""Runs with known weights and moments, operated on without a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_stable.checkpoint.catalog import Whole, newest_whole
from megatron_stable.checkpoint.format import Index, StoredShard, parameters_of, rank_file, write_contents
from megatron_stable.checkpoint.reader import Reader
from megatron_stable.checkpoint.tensors import write_tensors
from megatron_stable.config.load import replaced
from megatron_stable.parallel.shards import Place, Shard
from megatron_stable.records.directory import RunDirectory
from megatron_stable.surgery.operating import Operated, perform, planned
from tests.convert.models import VOCAB, tokens, write_run

KINDS = ("weight", "exp_avg", "exp_avg_sq")


def write_trained(path: Path, **model: Any) -> Whole:
    """A run whose checkpoint has moments, too, of random numbers."""
    write_run(path, **model)
    whole = newest_whole(path)
    values = whole_of(whole, ("weight",))
    generator = torch.Generator().manual_seed(1)
    for name, weight in [*values.items()]:
        plain = name.removesuffix(":weight")
        if not plain.endswith((".u", ".v")):
            values[f"{plain}:exp_avg"] = torch.randn(weight.shape, generator=generator)
            values[f"{plain}:exp_avg_sq"] = torch.rand(weight.shape, generator=generator)
    return rewritten(whole, values)


def rewritten(whole: Whole, values: dict[str, Tensor]) -> Whole:
    """A checkpoint with all its tensors in its place, by "NAME:kind", in one file."""
    flat = {key: value.flatten() for key, value in values.items()}
    entry = write_tensors(whole.directory / rank_file(0), {k: t.numel() for k, t in flat.items()}, flat.__getitem__)
    held = {}
    for key, value in values.items():
        name = key.partition(":")[0]
        kinds = KINDS if f"{name}:exp_avg" in values else ("weight",)
        held[name] = StoredShard.of(Shard(Place(tuple(value.shape), name=name), 0, value.numel()), kinds)
    index = Index(files={rank_file(0): entry}, parameters=parameters_of({0: held}))
    return Whole(whole.directory, whole.step, write_contents(whole.directory, index, whole.manifest))


def whole_of(whole: Whole, kinds: tuple[str, ...] = KINDS) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by "NAME:kind"."""
    reader = Reader(whole.directory, whole.manifest)
    return {
        f"{name}:{kind}": reader.full(name, kind, reader.shape(name))
        for name in reader.names()
        for kind in reader.parameters[name].kinds
        if kind in kinds
    }


def cut(whole: Whole, output: Path, values: dict[str, Any], samples: Tensor | None = None, **how: Any) -> Operated:
    """Operate on a checkpoint: values by dotted key."""
    from megatron_stable.checkpoint.format import stored_config

    before = stored_config(whole.directory, whole.manifest)
    after = planned(before, replaced(before, values), None)
    looked_at = tokens(8, before.model.sequence_length + 1) if samples is None else samples
    run = RunDirectory(output)
    done = perform(whole, before, after, looked_at, run.checkpoints / "step_00000007", **how)
    run.commit(done.config)
    return done


__all__ = ["VOCAB", "cut", "tokens", "whole_of", "write_trained"]
