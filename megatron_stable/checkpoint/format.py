"""What a checkpoint is on disk.

::

    checkpoints/step_00000100/
        manifest.json             version, step, layout, configuration, run state; checksums of itself and the index
        index.json                the files with their sizes and checksums, and where each parameter's elements are
        rank_00000.safetensors    what rank 0 owned: "NAME:weight", "NAME:exp_avg", "NAME:exp_avg_sq", all 1-d fp32
        rank_00001.safetensors    …
        health.json               only where a verdict was passed on it
        damaged.json              only where a resume found its checksums wrong: why
    checkpoints/latest            the name of the newest complete checkpoint, for people and scripts

The manifest is all that a look takes, and does not grow with the ranks. The index says of each parameter how tensor
parallelism sliced it, and of each slice which rank's file holds which elements of it, flattened. So a rank of any
layout reads the index, and of the files the parts that it needs. Each checksum is vouched for by another: of a tensor's
chunks in the header of its file, of the header in the index, of the index in the manifest. Tensors are safetensors, all
else is JSON; nothing that is read here can run code.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StringConstraints, model_validator

from megatron_stable.checkpoint.state import Layout, RunState
from megatron_stable.checkpoint.tensors import FileEntry
from megatron_stable.config.load import parse_config
from megatron_stable.config.schema import Config
from megatron_stable.disk import Damaged, parsed, read_bytes
from megatron_stable.errors import ConfigError, DataError
from megatron_stable.files import replace_file
from megatron_stable.parallel.shards import Place, Shard
from megatron_stable.persisted import (
    Count,
    FormatError,
    Persisted,
    package_version,
    refuse_unknown_format,
    validated,
)

VERSION = 2
MANIFEST, INDEX, LATEST = "manifest.json", "index.json", "latest"
# so that no path leaves the directory
FileName = Annotated[str, StringConstraints(pattern=r"^rank_[0-9]{5,9}\.safetensors$")]
Shape = Annotated[tuple[Count, ...], Field(min_length=1, max_length=8)]


class StoredShard(Persisted):
    """What a rank's file holds of a parameter: a :class:`Shard`, and of which kinds: "weight" and moments."""

    shape: Shape
    dim: Count | None
    low: Count
    high: Count
    start: Count
    numel: Count
    kinds: tuple[str, ...]

    @classmethod
    def of(cls, shard: Shard, kinds: tuple[str, ...]) -> StoredShard:
        """A shard, to be stored."""
        place = shard.place
        where = {"shape": place.full_shape, "dim": place.dim, "low": place.low, "high": place.high}
        return cls(**where, start=shard.start, numel=shard.numel, kinds=kinds)


class StoredSlice(Persisted):
    """A slice of a parameter, [low, high) along the sharded dimension, and where its elements are.

    Attributes:
        ranks: Of the files that hold them, in order.
        cuts: The file of ``ranks[i]`` holds elements ``[cuts[i], cuts[i + 1])`` of the flattened slice.
    """

    low: Count
    high: Count
    ranks: tuple[Count, ...]
    cuts: tuple[Count, ...]


class StoredParameter(Persisted):
    """A parameter, as the index has it: complete, each element once.

    Attributes:
        shape: Of the whole.
        dim: The dimension that tensor parallelism sliced, ``None``: none.
        kinds: "weight", and the moments that are stored.
        slices: In order, one without ``dim``.
    """

    shape: Shape
    dim: Count | None
    kinds: tuple[str, ...]
    slices: tuple[StoredSlice, ...]

    @model_validator(mode="after")
    def _each_element_once(self) -> StoredParameter:
        bounds = [0, *(each.high for each in self.slices)]
        if self.dim is None:
            tiled = bounds == [0, 0]
        else:
            ascending = all(low < high for low, high in pairwise(bounds))
            tiled = ascending and self.dim < len(self.shape) and bounds[-1] == self.shape[self.dim]
        if not tiled or [each.low for each in self.slices] != bounds[:-1]:
            raise ValueError(f"slices at {bounds[:9]} do not make up {list(self.shape)} along {self.dim}")
        for each in self.slices:
            cuts, numel = each.cuts, self.place(each).numel
            ascending = all(a < b for a, b in pairwise(cuts))
            if len(cuts) != len(each.ranks) + 1 or not ascending or (cuts[0], cuts[-1]) != (0, numel):
                raise ValueError(f"of a slice's {numel} elements the files hold others: {cuts[:9]}")
        return self

    def place(self, part: StoredSlice, name: str = "") -> Place:
        """Where a slice lies in the whole."""
        return Place(self.shape, self.dim, part.low, part.high, name=name)


class Index(Persisted):
    """Where everything is: the files, and the parameters by name."""

    files: dict[FileName, FileEntry]
    parameters: dict[str, StoredParameter]


class Manifest(Persisted):
    """The checkpoint's table of contents.

    Attributes:
        version: Of the format.
        written_by: Version of megatron-stable.
        step: The optimizer step it was taken after.
        layout: The ranks that wrote it.
        config: The resolved configuration of the run that wrote it.
        state: All else that a resume needs.
        bytes: Of the index and the ranks' files.
        index: The index's checksum, as ``sha256sum`` prints it.
    """

    version: Count = VERSION
    written_by: str = Field(default_factory=package_version)
    step: Count
    layout: Layout
    config: dict[str, Any]
    state: RunState
    bytes: Count = 0
    index: str = ""

    def dumps(self) -> str:
        """JSON, with a checksum of itself."""
        body = self.model_dump(mode="json")
        return json.dumps({**body, "sha256": digest(body)}, indent=1)


def parameters_of(held: Mapping[int, Mapping[str, StoredShard]]) -> dict[str, StoredParameter]:
    """The parameters of a checkpoint, by what each rank's file holds of them.

    Raises:
        DataError: An element is in none of the files, or in two.
    """
    found: dict[str, dict[tuple[int, int], list[tuple[int, int, int]]]] = defaultdict(lambda: defaultdict(list))
    looks: dict[str, StoredShard] = {}
    for rank, shards in held.items():
        for name, shard in shards.items():
            looks[name] = shard
            found[name][shard.low, shard.high].append((shard.start, shard.numel, rank))
    parameters = {}
    for name, slices in sorted(found.items()):
        stored = []
        for (low, high), pieces in sorted(slices.items()):
            pieces.sort()
            cuts = [0]
            for start, numel, rank in pieces:
                if start != cuts[-1]:
                    raise DataError(f"{name}: rank {rank} holds elements from {start} on, instead of {cuts[-1]}")
                cuts.append(start + numel)
            stored.append(StoredSlice(low=low, high=high, ranks=tuple(rank for *_, rank in pieces), cuts=tuple(cuts)))
        look = looks[name]
        body = {"shape": look.shape, "dim": look.dim, "kinds": look.kinds, "slices": tuple(stored)}
        parameters[name] = validated(StoredParameter, body, name)
    return parameters


def write_contents(directory: Path, index: Index, manifest: Manifest) -> Manifest:
    """Write index and manifest into a directory that holds the ranks' files; returns the manifest, complete."""
    data = index.model_dump_json().encode()
    replace_file(directory / INDEX, data)
    size = len(data) + sum(file.bytes for file in index.files.values())
    complete = manifest.model_copy(update={"bytes": size, "index": hashlib.sha256(data).hexdigest()})
    replace_file(directory / MANIFEST, complete.dumps().encode())
    return complete


def directory_name(step: int) -> str:
    """``step_00000100``."""
    return f"step_{step:08d}"


def rank_file(rank: int) -> str:
    """``rank_00000.safetensors``."""
    return f"rank_{rank:05d}.safetensors"


def read_manifest(directory: Path) -> Manifest:
    """Read and check a manifest: the version, its own checksum, every field.

    Raises:
        FormatError: Another version wrote it.
        Unreadable: It cannot be read.
        DataError: Something is wrong with it; the message names the file and what.
    """
    path = directory / MANIFEST
    body = parsed(read_bytes(path), path)
    refuse_unknown_format(directory, body, VERSION)
    if body.pop("sha256", None) != digest(body):
        raise Damaged(f"{path}: its checksum does not match its content: the file is damaged")
    if body["version"] != VERSION:
        raise FormatError(
            f"{directory} was written in format {body['version']}, before the first release; it is {VERSION} now"
        )
    return validated(Manifest, body, path)


def read_index(directory: Path, manifest: Manifest) -> Index:
    """Read and check an index.

    Raises:
        Unreadable: It cannot be read.
        Damaged: It is not the one that the manifest means.
        DataError: Something is wrong with it; the message names the file and what.
    """
    path = directory / INDEX
    data = read_bytes(path)
    if hashlib.sha256(data).hexdigest() != manifest.index:
        raise Damaged(f"{path}: its checksum does not match the manifest: the file is damaged")
    return validated(Index, parsed(data, path), path)


def stored_config(directory: Path, manifest: Manifest) -> Config:
    """The configuration of the run that wrote a checkpoint.

    Raises:
        DataError: It is none that this program knows.
    """
    try:
        return parse_config(manifest.config)
    except ConfigError as error:
        raise DataError(f"{directory / MANIFEST}: {error}") from None


def digest(body: dict[str, Any]) -> str:
    """Checksum of a manifest's content."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
