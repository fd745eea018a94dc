"""What a checkpoint is on disk.

::

    checkpoints/step_00000100/
        manifest.json             format version, step, layout, configuration, run state, files with sizes and checksums
        rank_00000.safetensors    what rank 0 owned: "NAME:weight", "NAME:exp_avg", "NAME:exp_avg_sq", all 1-d fp32
        rank_00001.safetensors    …
        health.json               only where a verdict was passed on it
        damaged.json              only where a resume found its checksums wrong: why
    checkpoints/latest            the name of the newest complete checkpoint, for people and scripts

Each rank file says in its header, under ``index``, which shard each tensor is: the parameter's full shape, the
sharded dimension with the bounds of the slice, and the first element within the flattened slice. So any layout
can read what it needs. Tensors are safetensors, all else is JSON; nothing that is read here can run code.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StringConstraints, model_validator

from megatron_stable.checkpoint.state import Layout, RunState
from megatron_stable.config.load import parse_config
from megatron_stable.config.schema import Config
from megatron_stable.errors import ConfigError, DataError
from megatron_stable.parallel.shards import Place, Shard
from megatron_stable.persisted import (
    Count,
    Persisted,
    package_version,
    read_json,
    refuse_unknown_format,
    require_plain,
    validated,
)

VERSION = 1
MANIFEST, LATEST = "manifest.json", "latest"
# so that no path leaves the directory
FileName = Annotated[str, StringConstraints(pattern=r"^rank_[0-9]{5,9}\.safetensors$")]


class StoredShard(Persisted):
    """A :class:`Shard` as the index of a rank file has it, under its parameter's name."""

    shape: Annotated[tuple[Count, ...], Field(min_length=1, max_length=8)]
    dim: Count | None
    low: Count
    high: Count
    start: Count
    numel: Count

    @model_validator(mode="after")
    def _within_the_whole(self) -> StoredShard:
        if self.dim is None:
            absurd = self.low or self.high
        else:
            absurd = self.dim >= len(self.shape) or not self.low < self.high <= self.shape[self.dim]
        if absurd:
            raise ValueError(f"absurd slice [{self.low}, {self.high}) along {self.dim} of {list(self.shape)}")
        if self.start + self.numel > self.shard("").place.numel:
            raise ValueError(f"absurd shard: {self.numel} elements from {self.start} on")
        return self

    @classmethod
    def of(cls, shard: Shard) -> StoredShard:
        """A shard, to be stored."""
        place = shard.place
        return cls(
            shape=place.full_shape, dim=place.dim, low=place.low, high=place.high, start=shard.start, numel=shard.numel
        )

    def shard(self, name: str) -> Shard:
        """The shard that this is, of the parameter ``name``."""
        return Shard(Place(self.shape, self.dim, self.low, self.high, name=name), self.start, self.numel)


class FileEntry(Persisted):
    """A file of a checkpoint: its size, and its checksum as ``sha256sum`` prints it."""

    bytes: Count
    sha256: str


class Manifest(Persisted):
    """The checkpoint's table of contents.

    Attributes:
        version: Of the format.
        written_by: Version of megatron-stable.
        step: The optimizer step it was taken after.
        layout: The ranks that wrote it.
        config: The resolved configuration of the run that wrote it.
        state: All else that a resume needs.
        files: By name.
    """

    version: Count = VERSION
    written_by: str = Field(default_factory=package_version)
    step: Count
    layout: Layout
    config: dict[str, Any]
    state: RunState
    files: dict[FileName, FileEntry]

    def dumps(self) -> str:
        """JSON, with a checksum of itself."""
        body = self.model_dump(mode="json")
        return json.dumps({**body, "sha256": digest(body)}, indent=1)


def index_of(shards: dict[str, Shard]) -> str:
    """What the header of a rank file says under ``index``: which shard it holds of which parameter."""
    return json.dumps({name: StoredShard.of(shard).model_dump() for name, shard in shards.items()})


def read_index(text: str, path: Path) -> dict[str, Shard]:
    """What :func:`index_of` wrote. DataError: it is none; ValueError or RecursionError: it is no JSON."""
    stored = validated(dict[str, StoredShard], json.loads(text), path)
    return {name: shard.shard(name) for name, shard in stored.items()}


def directory_name(step: int) -> str:
    """``step_00000100``."""
    return f"step_{step:08d}"


def rank_file(rank: int) -> str:
    """``rank_00000.safetensors``."""
    return f"rank_{rank:05d}.safetensors"


def read_manifest(directory: Path) -> Manifest:
    """Read and check a manifest: the version, its own checksum, every field.

    Raises:
        FormatError: A newer version wrote it.
        DataError: Something is wrong with it; the message names the file and what.
    """
    path = directory / MANIFEST
    body = read_json(path)
    refuse_unknown_format(directory, body, VERSION)
    if body.pop("sha256", None) != digest(body):
        raise DataError(f"{path}: its checksum does not match its content: the file is damaged")
    return validated(Manifest, body, path)


def stored_config(directory: Path, manifest: Manifest) -> Config:
    """The configuration of the run that wrote a checkpoint.

    Raises:
        DataError: It is none that this program knows.
    """
    try:
        return parse_config(manifest.config)
    except ConfigError as error:
        raise DataError(f"{directory / MANIFEST}: {error}") from None


def verify_file(directory: Path, name: str, entry: FileEntry, checksum: bool = True) -> str | None:
    """What is wrong with a file of a checkpoint, in words; ``None`` if nothing is."""
    path = directory / name
    try:
        require_plain(path)
        size = path.stat().st_size
        if size != entry.bytes:
            return f"{path}: {size} bytes instead of {entry.bytes}"
        if checksum and sha256(path) != entry.sha256:
            return f"{path}: its checksum does not match the manifest: the file is damaged"
    except (DataError, OSError) as error:
        return str(error)
    return None


def sha256(path: Path) -> str:
    """Checksum of a file, as ``sha256sum`` prints it."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            found.update(chunk)
    return found.hexdigest()


def file_entry(path: Path) -> FileEntry:
    """Of a file that is complete."""
    return FileEntry(bytes=path.stat().st_size, sha256=sha256(path))


def digest(body: dict[str, Any]) -> str:
    """Checksum of a manifest's content."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
