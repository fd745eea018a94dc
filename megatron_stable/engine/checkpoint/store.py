"""The checkpoints of a run: which there are, which are complete, which is loaded, which are deleted."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_stable.engine.checkpoint.format import LATEST, Manifest, read_manifest, verify_file, write_synced
from megatron_stable.errors import DataError

COMPLETE = re.compile(r"step_(\d{8,})")
PARTIAL = re.compile(r"\.step_\d{8,}\.[0-9a-f]+(\.deleted)?")


@dataclass(frozen=True)
class Entry:
    """A checkpoint directory: its manifest, or why it cannot be used."""

    directory: Path
    step: int
    manifest: Manifest | None
    problem: str | None


def entries(root: Path) -> list[Entry]:
    """All checkpoints below ``root`` (a run's ``checkpoints``), oldest first; only manifests are read."""
    found = []
    for directory in root.iterdir() if root.is_dir() else ():
        match = COMPLETE.fullmatch(directory.name)
        if match is None:
            continue
        try:
            if directory.is_symlink():
                raise DataError(f"{directory}: a symbolic link, which is not a checkpoint")
            manifest = read_manifest(directory)
            problem = next(
                filter(None, (verify_file(directory, *item, checksum=False) for item in manifest.files.items())), None
            )
            if manifest.step != int(match[1]):
                problem = f"{directory}: its manifest is that of step {manifest.step}"
        except (DataError, OSError) as error:
            manifest, problem = None, str(error)
        found.append(Entry(directory, int(match[1]), None if problem else manifest, problem))
    return sorted(found, key=lambda entry: entry.step)


def damage(entry: Entry, share: int = 0, shares: int = 1) -> str | None:
    """Verify checksums of every ``shares``-th file of a checkpoint; what is wrong in words, or ``None``."""
    if entry.manifest is None:
        return entry.problem
    files = sorted(entry.manifest.files.items())[share::shares]
    return next(filter(None, (verify_file(entry.directory, *item) for item in files)), None)


def clean(root: Path) -> list[Path]:
    """Delete what unfinished saves and deletions of earlier processes left behind; only safe before training starts."""
    leftovers = [path for path in root.iterdir() if PARTIAL.fullmatch(path.name)] if root.is_dir() else []
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return leftovers


def rotate(root: Path, keep: int) -> list[int]:
    """Delete all but the newest ``keep`` complete checkpoints (and those too damaged to list that are older)."""
    complete = [entry for entry in entries(root) if entry.manifest is not None]
    doomed = complete[:-keep]
    for entry in doomed:
        # renamed first: a directory that is half deleted must not look like a checkpoint
        gone = entry.directory.with_name(f".{entry.directory.name}.0.deleted")
        entry.directory.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    return [entry.step for entry in doomed]


def point_latest(root: Path, name: str) -> None:
    """Write the ``latest`` pointer."""
    write_synced(root / LATEST, name + "\n")
