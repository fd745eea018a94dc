"""The checkpoints of a run: which there are, which are complete, which is loaded, which are deleted."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_stable.checkpoint.format import LATEST, Manifest, directory_name, read_index, read_manifest
from megatron_stable.checkpoint.health import Retention, doomed, judge, mark, verdict
from megatron_stable.checkpoint.reader import Reader
from megatron_stable.disk import Unreadable, patiently
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
    """Why a checkpoint cannot be used: which checksum did not match."""

    problem: str


@dataclass(frozen=True)
class Entry:
    """A checkpoint directory: its manifest, or why it cannot be used.

    Attributes:
        unreadable: The problem is that it cannot be read; it may be whole.
        abandoned: The run went back to an earlier one since; see :mod:`megatron_stable.stability.interventions`.
    """

    directory: Path
    step: int
    manifest: Manifest | None
    problem: str | None = None
    unreadable: bool = False
    abandoned: bool = False

    @property
    def usable(self) -> bool:
        """Whether the run may go on from it."""
        return self.manifest is not None and not self.abandoned


class Shelf:
    """A run's checkpoints through the eyes of the one process that writes, judges and deletes them.

    What was seen once, or put here, is not read again: a look lists the directory, and reads what is new in it.

    Args:
        root: The run's ``checkpoints``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[Path, Entry] = {}
        self._verdicts: dict[Path, bool | None] = {}

    def entries(self) -> list[Entry]:
        """All checkpoints, oldest first; only manifests are read, each a file whose size does not depend on the ranks.

        Raises:
            DataError: The directory or the run's interventions cannot be read, or a newer version wrote the run.
        """
        require_known_format(self.root.parent)
        steps = _steps(self.root)
        line = read_interventions(self.root.parent) if steps else None
        found = {path: self._known.get(path) or _look(path, step) for path, step in steps.items()}
        self._known = {path: entry for path, entry in found.items() if not entry.unreadable}
        return [_on(line, entry) for entry in sorted(found.values(), key=lambda entry: entry.step)]

    def verdict(self, entry: Entry) -> bool | None:
        """The verdict on a checkpoint, ``None`` if none was passed."""
        if entry.directory not in self._verdicts:
            self._verdicts[entry.directory] = verdict(entry.directory)
        return self._verdicts[entry.directory]

    def candidates(self) -> list[Candidate]:
        """What the run could go back to.

        Raises:
            DataError: As :meth:`entries`.
        """
        usable = [(entry, entry.manifest) for entry in self.entries() if entry.usable and entry.manifest is not None]
        return [Candidate(entry.step, m.state.course.behind(entry.step), self.verdict(entry)) for entry, m in usable]

    def put(self, entry: Entry) -> None:
        """Take note of a checkpoint that was just written."""
        self._known[entry.directory], self._verdicts[entry.directory] = entry, None

    def judge(self, now: int, bad: Collection[int], healthy_after: int) -> None:
        """Pass a verdict at step ``now`` on every checkpoint that is due one; see :func:`health.judge`."""
        for entry in self.entries():
            if entry.usable and entry.step < now and self.verdict(entry) is None:
                healthy = judge(entry.step, now, bad, healthy_after)
                if healthy is not None:
                    mark(entry.directory, healthy, now)
                    self._verdicts[entry.directory] = healthy

    def mark_damaged(self, entry: Entry, problem: str) -> None:
        """Record that a checkpoint's checksums do not hold, so that rotation does not count it as complete."""
        note = Damage(problem=problem).model_dump_json()
        replace_file(entry.directory / DAMAGED, f"{note}\n".encode())
        self._known[entry.directory] = replace(entry, manifest=None, problem=problem)

    def rotate(self, rule: Retention) -> list[int]:
        """Delete the complete checkpoints that ``rule`` does not keep; returns their steps.

        Abandoned ones go when the run has passed them. What is damaged, or cannot be read, is the user's.
        """
        found = self.entries()
        complete = {entry.step: entry for entry in found if entry.usable}
        verdicts = {step: self.verdict(entry) for step, entry in complete.items()}
        healthy, unhealthy = ([step for step, found in verdicts.items() if found is word] for word in (True, False))
        passed = {entry.step: entry for entry in found if entry.abandoned and entry.step < max(complete, default=0)}
        gone = {**{step: complete[step] for step in doomed(complete, healthy, rule, unhealthy)}, **passed}
        for entry in gone.values():
            delete(entry.directory)
        return sorted(gone)


def entries(root: Path) -> list[Entry]:
    """All checkpoints below ``root``, a run's ``checkpoints``, oldest first; see :meth:`Shelf.entries`."""
    return Shelf(root).entries()


def _steps(root: Path) -> dict[Path, int]:
    """The directories that are named as checkpoints are, and their steps."""
    names = patiently(lambda: [path.name for path in root.iterdir()] if root.is_dir() else [], root)
    return {root / name: int(match[1]) for name in names if (match := COMPLETE.fullmatch(name))}


def _look(directory: Path, step: int) -> Entry:
    try:
        if patiently(directory.is_symlink, directory):
            raise DataError(f"{directory}: a symbolic link, which is not a checkpoint")
        if patiently((directory / DAMAGED).exists, directory):
            raise DataError(read_as(Damage, directory / DAMAGED).problem)
        manifest = read_manifest(directory)
        if manifest.step != step:
            raise DataError(f"{directory}: its manifest is that of step {manifest.step}")
    except FormatError:  # it is not damaged, and to go on from an older one would abandon it
        raise
    except DataError as error:
        return Entry(directory, step, None, str(error), unreadable=isinstance(error, Unreadable))
    return Entry(directory, step, manifest)


def _on(line: Interventions | None, entry: Entry) -> Entry:
    """The entry, with whether the run has left it behind."""
    if line is None or entry.manifest is None:
        return entry
    return replace(entry, abandoned=not line.holds(entry.step, entry.manifest.state.interventions))


def missing(entry: Entry) -> str | None:
    """What is wrong with a checkpoint as far as index and names of files tell, or ``None``; in words."""
    if entry.manifest is None:
        return entry.problem
    try:
        wanted = read_index(entry.directory, entry.manifest).files.keys()
        gone = sorted(wanted - {path.name for path in entry.directory.iterdir()})
    except (DataError, OSError) as error:
        return str(error)
    return f"{entry.directory / gone[0]}: missing" if gone else None


def damage(entry: Entry) -> str | None:
    """Read all of a checkpoint and compare all checksums; what is wrong in words, or ``None``."""
    if entry.manifest is None:
        return entry.problem
    try:
        Reader(entry.directory, entry.manifest).verify()
    except DataError as error:
        return str(error)
    return None


def clean(root: Path) -> list[Path]:
    """Delete what unfinished saves and deletions of earlier processes left behind; only safe before training starts."""
    leftovers = [path for path in root.iterdir() if PARTIAL.fullmatch(path.name)] if root.is_dir() else []
    for path in leftovers:
        remove(path)
    return leftovers


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
