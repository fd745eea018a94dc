"""What a checkpoint is on disk.

::

    checkpoints/step_00000100/
        manifest.json             format version, step, layout, configuration, run state, files with sizes and checksums
        rank_00000.safetensors    what rank 0 owned: "NAME:weight", "NAME:exp_avg", "NAME:exp_avg_sq", all 1-d fp32
        rank_00001.safetensors    …
        damaged.json              only where a resume found its checksums wrong: why
    checkpoints/latest            the name of the newest complete checkpoint, for people and scripts

Each rank file says in its header, under ``index``, which part of the whole each tensor is: full shape, the
sharded dimension with the bounds of the slice, and the first element within the flattened slice. So any layout
can read what it needs. Tensors are safetensors, all else is JSON; nothing that is read here can run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron_stable.config.load import parse_config
from megatron_stable.config.schema import Config
from megatron_stable.engine.shards import Shard
from megatron_stable.errors import ConfigError, DataError

VERSION = 1
MANIFEST, LATEST = "manifest.json", "latest"
LARGEST_JSON = 2**26  # bytes: refuse to parse anything absurd; a manifest has some 120 bytes per rank
RANK_FILE = re.compile(r"rank_\d{5,9}\.safetensors")


@dataclass(frozen=True)
class Piece:
    """Which part of a parameter a stored tensor is.

    Attributes:
        shape: Full shape of the parameter.
        dim: The dimension that was sharded, or ``None``.
        low, high: Bounds of the slice along ``dim`` (0 and 0 without one).
        start: First element within the flattened slice.
        numel: Elements.
    """

    shape: tuple[int, ...]
    dim: int | None
    low: int
    high: int
    start: int
    numel: int

    def slice_shape(self) -> tuple[int, ...]:
        """Shape of the slice that this is a piece of."""
        return tuple(self.high - self.low if i == self.dim else n for i, n in enumerate(self.shape))

    def slice_numel(self) -> int:
        """Elements of the slice that this is a piece of."""
        return prod(self.slice_shape())


def piece_of(shard: Shard) -> Piece:
    """The piece that a rank's shard is."""
    known = shard.place
    return Piece(known.full_shape, known.dim, *known.bounds, shard.start, shard.numel)


@dataclass(frozen=True)
class Manifest:
    """The checkpoint's table of contents.

    Attributes:
        step: The optimizer step it was taken after.
        layout: TP, PP, DP, ZeRO stage and dtype of the ranks that wrote it.
        config: The resolved configuration of the run that wrote it.
        state: All else that a resume needs, as plain values: Adam's step count, loss scaler, skip windows.
        files: ``{name: {"bytes": n, "sha256": hex}}``.
    """

    step: int
    layout: dict[str, Any]
    config: dict[str, Any]
    state: dict[str, Any]
    files: dict[str, dict[str, Any]]
    version: int = VERSION

    def dumps(self) -> str:
        """JSON, with a checksum of itself."""
        body = asdict(self)
        return json.dumps({**body, "sha256": _digest(body)}, indent=1)


def directory_name(step: int) -> str:
    """``step_00000100``."""
    return f"step_{step:08d}"


def rank_file(rank: int) -> str:
    """``rank_00000.safetensors``."""
    return f"rank_{rank:05d}.safetensors"


def read_manifest(directory: Path) -> Manifest:
    """Read and check a manifest: its own checksum, the version, and that file names stay within the directory.

    Raises:
        DataError: Something is wrong with it; the message names the file and what.
    """
    path = directory / MANIFEST
    body = read_json(path)
    checksum = body.pop("sha256", None)
    if checksum != _digest(body):
        raise DataError(f"{path}: its checksum does not match its content: the file is damaged")
    if body.get("version") != VERSION:
        raise DataError(f"{path}: format version {body.get('version')!r}; this program reads version {VERSION}")
    try:
        manifest = Manifest(**body)
        entries = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest.files.items()}
        if type(manifest.step) is not int or not all(
            isinstance(part, dict) for part in (manifest.layout, manifest.config, manifest.state)
        ):
            raise ValueError("fields of the wrong type")
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"{path}: not a manifest ({error})") from None
    for name in entries:
        if not RANK_FILE.fullmatch(name):  # so that no path leaves the directory
            raise DataError(f"{path}: {name!r} is not the name of a file of a checkpoint")
    return manifest


def stored_config(directory: Path, manifest: Manifest) -> Config:
    """The configuration of the run that wrote a checkpoint.

    Raises:
        DataError: It is none that this program knows.
    """
    try:
        return parse_config(manifest.config)
    except ConfigError as error:
        raise DataError(f"{directory / MANIFEST}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a plain file of sane size.

    Raises:
        DataError: It is missing, a link, too large or no JSON object.
    """
    require_plain(path)
    if path.stat().st_size > LARGEST_JSON:
        raise DataError(f"{path}: {path.stat().st_size} bytes is too large to be one of ours")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise DataError(f"{path}: not JSON: the file is damaged or not one of ours") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object")
    return value


def require_plain(path: Path) -> None:
    """Raise DataError unless ``path`` is a plain file and no link."""
    if path.is_symlink():
        raise DataError(f"{path}: a symbolic link, which a checkpoint does not hold")
    if not path.is_file():
        raise DataError(f"{path}: missing")


def verify_file(directory: Path, name: str, entry: dict[str, Any], checksum: bool = True) -> str | None:
    """What is wrong with a file of a checkpoint, in words; ``None`` if nothing is."""
    path = directory / name
    try:
        require_plain(path)
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{path}: {size} bytes instead of {entry['bytes']}"
        if checksum and sha256(path) != entry["sha256"]:
            return f"{path}: its checksum does not match the manifest: the file is damaged"
    except (DataError, OSError) as error:
        return str(error)
    return None


def sha256(path: Path) -> str:
    """Checksum of a file, as ``sha256sum`` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(2**22):
        digest.update(chunk)
    return digest.hexdigest()


def write_synced(path: Path, text: str) -> None:
    """Write a small file so that it is complete or absent: beside, fsynced, renamed."""
    beside = path.with_name(f".{path.name}.new")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames within a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
