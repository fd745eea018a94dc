"""Rewrite a checkpoint for another TP x PP x DP layout: offline, without a GPU, one tensor in memory at a time.

`pretrain` reads any layout by itself; this is for moving a checkpoint to machines on which each rank should find just
its part.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_stable.checkpoint.format import (
    MANIFEST,
    Manifest,
    Piece,
    directory_name,
    rank_file,
    sha256,
    sync_directory,
    write_synced,
)
from megatron_stable.checkpoint.reader import Reader
from megatron_stable.checkpoint.store import point_latest
from megatron_stable.config.load import parse_config
from megatron_stable.convert.stream import TensorStream
from megatron_stable.errors import ConfigError
from megatron_stable.model.transformer import layer_list
from megatron_stable.parallel.stages import stage_bounds
from megatron_stable.parallel.topology import TensorParallel


@dataclass(frozen=True)
class Layout:
    """The ranks to write for; rank order is (pipeline, data, tensor), tensor innermost."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.tensor * self.pipeline * self.data


def reshard(
    source: Path, manifest: Manifest, root: Path, layout: Layout, on_progress: Callable[[int, int], None] | None = None
) -> Path:
    """Write the checkpoint ``source`` below ``root`` (a run's ``checkpoints``) for ``layout``.

    Args:
        on_progress: Called with (parameters done, parameters in all).

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
        streams = {
            rank: TensorStream(
                beside / rank_file(rank),
                {
                    f"{name}:{kind}": piece.numel
                    for name, piece in pieces.items()
                    for kind in sorted(reader.kinds[name])
                },
                {"format": "pt", "index": json.dumps({name: asdict(piece) for name, piece in pieces.items()})},
            )
            for rank, pieces in files.items()
        }
        names = reader.names()
        for done, name in enumerate(names):
            if on_progress:
                on_progress(done, len(names))
            for kind in sorted(reader.kinds[name]):
                for rank, pieces in files.items():
                    if name in pieces:
                        streams[rank].write(f"{name}:{kind}", reader.part(name, kind, pieces[name]))
        if on_progress:
            on_progress(len(names), len(names))
        entries = {}
        for stream in streams.values():
            stream.sync()
            entries[stream.path.name] = {"bytes": stream.path.stat().st_size, "sha256": sha256(stream.path)}
        shape = {**manifest.layout, "tensor": layout.tensor, "pipeline": layout.pipeline, "data": layout.data}
        write_synced(beside / MANIFEST, replace(manifest, layout=shape, files=entries).dumps())
        beside.rename(final)
        sync_directory(root)
        point_latest(root, manifest.step)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return final


def _plan(reader: Reader, manifest: Manifest, layout: Layout) -> dict[int, dict[str, Piece]]:
    """Which piece of which parameter each rank's file holds."""
    stages = _stages(reader, manifest, layout.pipeline)
    files: dict[int, dict[str, Piece]] = defaultdict(dict)
    for name in reader.names():
        shape, dim = reader.shape(name), reader.pieces[name][0][1].dim
        if dim is not None and shape[dim] % layout.tensor:
            raise ConfigError(f"{name} {list(shape)} cannot be split over {layout.tensor} tensor-parallel ranks")
        for tensor in range(layout.tensor if dim is not None else 1):
            width = shape[dim] // layout.tensor if dim is not None else 0
            whole = Piece(shape, dim, tensor * width, (tensor + 1) * width, 0, 0)
            total = whole.slice_numel()
            cuts = [total * part // layout.data for part in range(layout.data + 1)]
            for data, (start, stop) in enumerate(itertools.pairwise(cuts)):
                if start < stop:
                    rank = (stages[name] * layout.data + data) * layout.tensor + tensor
                    files[rank][name] = replace(whole, start=start, numel=stop - start)
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
