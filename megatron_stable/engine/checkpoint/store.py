"""The checkpoints of a run: which there are, which are complete, which is loaded, which are deleted."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from megatron_stable.engine.checkpoint.format import (
    LATEST,
    Manifest,
    read_json,
    read_manifest,
    verify_file,
    write_synced,
)
from megatron_stable.engine.checkpoint.health import Retention, doomed, judge, mark, verdict
from megatron_stable.errors import DataError

COMPLETE = re.compile(r"step_(\d{8,})")
PARTIAL = re.compile(r"\.step_\d{8,}\.[0-9a-f]+(\.deleted)?")
DAMAGED = "damaged.json"


@dataclass(frozen=True)
class Entry:
    """A checkpoint directory: its manifest, or why it cannot be used."""

    directory: Path
    step: int
    manifest: Manifest | None
    problem: str | None


def entries(root: Path) -> list[Entry]:
    """All checkpoints below ``root`` (a run's ``checkpoints``), oldest first; only manifests are read."""
    try:
        names = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    except OSError as error:
        raise DataError(f"{root} cannot be read: {error.strerror or error}") from None
    found = [_entry(root / name, int(match[1])) for name in names if (match := COMPLETE.fullmatch(name))]
    return sorted(found, key=lambda entry: entry.step)


def _entry(directory: Path, step: int) -> Entry:
    try:
        if directory.is_symlink():
            raise DataError(f"{directory}: a symbolic link, which is not a checkpoint")
        if (directory / DAMAGED).exists():
            raise DataError(str(read_json(directory / DAMAGED).get("problem")))
        manifest = read_manifest(directory)
        if manifest.step != step:
            raise DataError(f"{directory}: its manifest is that of step {manifest.step}")
        checks = (verify_file(directory, *item, checksum=False) for item in manifest.files.items())
        problem = next(filter(None, checks), None)
    except (DataError, OSError) as error:
        manifest, problem = None, str(error)
    return Entry(directory, step, None if problem else manifest, problem)


def mark_damaged(entry: Entry, problem: str) -> None:
    """Record that a checkpoint's checksums do not hold, so that rotation does not count it as complete."""
    if entry.manifest is not None:
        write_synced(entry.directory / DAMAGED, json.dumps({"problem": problem}) + "\n")


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
        remove(path)
    return leftovers


def rotate(root: Path, rule: Retention) -> list[int]:
    """Delete the complete checkpoints that ``rule`` does not keep; returns their steps. Damaged ones are the user's."""
    complete = {entry.step: entry.directory for entry in entries(root) if entry.manifest is not None}
    healthy = [step for step, directory in complete.items() if verdict(directory)]
    gone = doomed(complete, healthy, rule)
    for step in gone:
        delete(complete[step])
    return gone


def judge_all(root: Path, now: int, bad: Collection[int], healthy_after: int) -> None:
    """Pass a verdict at step ``now`` on every checkpoint that is due one; see :func:`health.judge`."""
    for entry in entries(root):
        if entry.manifest is not None and entry.step < now and verdict(entry.directory) is None:
            healthy = judge(entry.step, now, bad, healthy_after)
            if healthy is not None:
                mark(entry.directory, healthy, now)


def delete(directory: Path) -> None:
    """Delete a checkpoint."""
    remove(retire(directory))


def retire(directory: Path) -> Path:
    """Rename a checkpoint before it is deleted: one that is half deleted must not look like one."""
    gone = directory.with_name(f".{directory.name}.0.deleted")
    remove(gone)
    return directory.rename(gone)


def remove(path: Path) -> None:
    """Remove a directory, or a link to one, as far as possible."""
    path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)


def point_latest(root: Path, name: str) -> None:
    """Write the ``latest`` pointer."""
    write_synced(root / LATEST, name + "\n")
