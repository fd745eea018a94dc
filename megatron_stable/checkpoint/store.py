"""The checkpoints of a run: which there are, which are complete, which is loaded, which are deleted."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_stable.checkpoint.format import LATEST, Manifest, directory_name, read_manifest, verify_file
from megatron_stable.checkpoint.health import Retention, doomed, judge, mark, verdict
from megatron_stable.errors import DataError
from megatron_stable.files import replace_file
from megatron_stable.persisted import FormatError, Persisted, read_as
from megatron_stable.records.directory import require_known_format
from megatron_stable.records.interventions import read_interventions
from megatron_stable.stability.interventions import Interventions
from megatron_stable.stability.recovery import Candidate

COMPLETE = re.compile(r"step_(\d{8,})")
PARTIAL = re.compile(r"\.step_\d{8,}\.[0-9a-f]+(\.deleted)?")
DAMAGED = "damaged.json"


class Damage(Persisted):
    """Why a checkpoint cannot be used."""

    problem: str


@dataclass(frozen=True)
class Entry:
    """A checkpoint directory: its manifest, or why it cannot be used.

    Attributes:
        abandoned: The run went back to an earlier one since; see :mod:`megatron_stable.stability.interventions`.
    """

    directory: Path
    step: int
    manifest: Manifest | None
    problem: str | None
    abandoned: bool = False

    @property
    def usable(self) -> bool:
        """Whether the run may go on from it."""
        return self.manifest is not None and not self.abandoned


def entries(root: Path) -> list[Entry]:
    """All checkpoints below ``root`` (a run's ``checkpoints``), oldest first; only manifests are read.

    Raises:
        DataError: The directory or the run's interventions cannot be read, or a newer version wrote the run.
    """
    require_known_format(root.parent)
    try:
        names = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    except OSError as error:
        raise DataError(f"{root} cannot be read: {error.strerror or error}") from None
    line = read_interventions(root.parent) if names else None
    found = [_entry(root / name, int(match[1]), line) for name in names if (match := COMPLETE.fullmatch(name))]
    return sorted(found, key=lambda entry: entry.step)


def candidates(found: Iterable[Entry]) -> list[Candidate]:
    """What a run could go back to, of its checkpoints."""
    usable = [(entry, entry.manifest) for entry in found if entry.usable and entry.manifest is not None]
    return [Candidate(entry.step, manifest.state.data_step, verdict(entry.directory)) for entry, manifest in usable]


def _entry(directory: Path, step: int, line: Interventions | None) -> Entry:
    abandoned = False
    try:
        if directory.is_symlink():
            raise DataError(f"{directory}: a symbolic link, which is not a checkpoint")
        if (directory / DAMAGED).exists():
            raise DataError(read_as(Damage, directory / DAMAGED).problem)
        manifest = read_manifest(directory)
        if manifest.step != step:
            raise DataError(f"{directory}: its manifest is that of step {manifest.step}")
        abandoned = line is not None and not line.holds(step, manifest.state.interventions)
        checks = (verify_file(directory, *item, checksum=False) for item in manifest.files.items())
        problem = next(filter(None, checks), None)
    except FormatError:  # it is not damaged, and to go on from an older one would abandon it
        raise
    except (DataError, OSError) as error:
        manifest, problem = None, str(error)
    return Entry(directory, step, None if problem else manifest, problem, abandoned)


def mark_damaged(entry: Entry, problem: str) -> None:
    """Record that a checkpoint's checksums do not hold, so that rotation does not count it as complete."""
    if entry.manifest is not None:
        note = Damage(problem=problem).model_dump_json()
        replace_file(entry.directory / DAMAGED, f"{note}\n".encode())


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
    """Delete the complete checkpoints that ``rule`` does not keep; returns their steps. Damaged ones are the user's.

    Abandoned ones go when the run has passed them.
    """
    found = entries(root)
    complete = {entry.step: entry.directory for entry in found if entry.usable}
    verdicts = {step: verdict(directory) for step, directory in complete.items()}
    healthy, unhealthy = ([step for step, found in verdicts.items() if found is word] for word in (True, False))
    passed = {e.step: e.directory for e in found if e.abandoned and e.step < max(complete, default=0)}
    gone = {**{step: complete[step] for step in doomed(complete, healthy, rule, unhealthy)}, **passed}
    for directory in gone.values():
        delete(directory)
    return sorted(gone)


def judge_all(root: Path, now: int, bad: Collection[int], healthy_after: int) -> None:
    """Pass a verdict at step ``now`` on every checkpoint that is due one; see :func:`health.judge`."""
    for entry in entries(root):
        if entry.usable and entry.step < now and verdict(entry.directory) is None:
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


def point_latest(root: Path, step: int) -> None:
    """Write the ``latest`` pointer."""
    replace_file(root / LATEST, f"{directory_name(step)}\n".encode())
