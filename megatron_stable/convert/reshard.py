"""Rewrite a checkpoint for another TP x PP x DP layout: offline, without a GPU, one tensor in memory at a time.

`pretrain` reads any layout by itself; this is for moving a checkpoint to machines on which each rank should find just
its part.
"""

from __future__ import annotations

import itertools
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from megatron_stable.checkpoint.format import (
    Index,
    Manifest,
    StoredShard,
    directory_name,
    parameters_of,
    rank_file,
    write_contents,
)
from megatron_stable.checkpoint.reader import Reader
from megatron_stable.checkpoint.state import Layout
from megatron_stable.checkpoint.store import point_latest
from megatron_stable.checkpoint.tensors import FileEntry, write_tensors
from megatron_stable.config.load import parse_config
from megatron_stable.errors import ConfigError
from megatron_stable.files import sync_directory
from megatron_stable.model.transformer import layer_list
from megatron_stable.parallel.shards import Place, Shard
from megatron_stable.parallel.stages import stage_bounds
from megatron_stable.parallel.topology import TensorParallel
from megatron_stable.persisted import package_version


def reshard(
    source: Path, manifest: Manifest, root: Path, layout: Layout, on_progress: Callable[[int, int], None] | None = None
) -> Path:
    """Write the checkpoint ``source`` below ``root`` (a run's ``checkpoints``) for ``layout``.

    Args:
        on_progress: Called with (files written, files in all).

    Returns:
        The new checkpoint's directory; it appears complete or not at all.

    Raises:
        ConfigError: The model cannot be laid out so, or the checkpoint is already there.
        DataError: The source is damaged.
    """
    reader = Reader(source, manifest)
    files = _plan(reader, manifest, layout)
    final = root / directory_name(manifest.step)
    if final.exists():
        raise ConfigError(f"{final} is already there; choose another --output")
    beside = root / f".{final.name}.0"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        entries, held = dict[str, FileEntry](), dict[int, dict[str, StoredShard]]()
        for done, (rank, shards) in enumerate(files.items()):
            if on_progress:
                on_progress(done, len(files))
            entries[rank_file(rank)] = _write(reader, beside / rank_file(rank), shards)
            held[rank] = {n: StoredShard.of(shard, reader.parameters[n].kinds) for n, shard in shards.items()}
        if on_progress:
            on_progress(len(files), len(files))
        written = manifest.model_copy(update={"layout": layout, "written_by": package_version()})
        write_contents(beside, Index(files=entries, parameters=parameters_of(held)), written)
        beside.rename(final)
        sync_directory(root)
        point_latest(root, manifest.step)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return final


def _write(reader: Reader, path: Path, shards: dict[str, Shard]) -> FileEntry:
    """Write a rank's file."""
    wanted = {
        f"{name}:{kind}": (kind, shard) for name, shard in shards.items() for kind in reader.parameters[name].kinds
    }
    sizes = {key: shard.numel for key, (_, shard) in wanted.items()}
    return write_tensors(path, sizes, lambda key: reader.part(*wanted[key]))


def _plan(reader: Reader, manifest: Manifest, layout: Layout) -> dict[int, dict[str, Shard]]:
    """Which shard of which parameter each rank's file holds."""
    stages = _stages(reader, manifest, layout.pipeline)
    files: dict[int, dict[str, Shard]] = defaultdict(dict)
    for name in reader.names():
        shape, dim = reader.shape(name), reader.parameters[name].dim
        if dim is not None and shape[dim] % layout.tensor:
            raise ConfigError(f"{name} {list(shape)} cannot be split over {layout.tensor} tensor-parallel ranks")
        for tensor in range(layout.tensor if dim is not None else 1):
            width = shape[dim] // layout.tensor if dim is not None else 0
            place = Place(shape, dim, tensor * width, (tensor + 1) * width, name=name)
            cuts = [place.numel * part // layout.data for part in range(layout.data + 1)]
            for data, (start, stop) in enumerate(itertools.pairwise(cuts)):
                if start < stop:
                    rank = (stages[name] * layout.data + data) * layout.tensor + tensor
                    files[rank][name] = Shard(place, start, stop - start)
    return dict(sorted(files.items()))


def _stages(reader: Reader, manifest: Manifest, stages: int) -> dict[str, int]:
    """The pipeline stage that owns each parameter."""
    config = parse_config(manifest.config)
    layers = layer_list(config.model, TensorParallel(), config.run.seed)
    blocks = [layer.name.startswith("blocks.") for layer in layers]
    if sum(blocks) < stages:
        raise ConfigError(f"model.layers {sum(blocks)} is less than {stages} pipeline stages")
    bounds = stage_bounds([layer.cost for layer in layers], blocks, stages)
    stage_of = {
        layer.name: next(stage for stage in range(stages) if bounds[stage] <= index < bounds[stage + 1])
        for index, layer in enumerate(layers)
    }
    return {
        name: next(stage_of[layer] for layer in stage_of if name.startswith(f"{layer}.")) for name in reader.names()
    }
