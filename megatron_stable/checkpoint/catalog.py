"""A run's checkpoints for people and tools: pick one, describe them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from megatron_stable.checkpoint import store
from megatron_stable.checkpoint.format import MANIFEST, Manifest
from megatron_stable.checkpoint.health import WORDS, verdict
from megatron_stable.errors import DataError


class Whole(NamedTuple):
    """A checkpoint that is complete and whose checksums hold."""

    directory: Path
    step: int
    manifest: Manifest


def newest_whole(run: str | Path, step: int | None = None, verify: bool = True) -> Whole:
    """The newest checkpoint of a run that is not abandoned, or the one of ``step``; in one process.

    Args:
        verify: Read all of it; else only what is used of it is verified, when it is read.

    Raises:
        DataError: There is none, or it is damaged.
    """
    root = Path(run) / "checkpoints"
    if not root.is_dir():
        raise DataError(f"{run} is no run's directory: it has no checkpoints/; name the run.directory of a run")
    found = [entry for entry in store.entries(root) if (not entry.abandoned if step is None else entry.step == step)]
    problem = None
    for entry in reversed(found):
        wrong = store.damage(entry) if verify else entry.problem
        if wrong is None and entry.manifest is not None:
            if problem:  # to take an older one unasked would pass it off as what the run has come to
                raise DataError(
                    f"the newest checkpoint of {run} cannot be used: {problem}; name the newest that is whole: "
                    f"step {entry.step}"
                )
            return Whole(entry.directory, entry.step, entry.manifest)
        problem = problem or wrong
    if problem:
        raise DataError(f"no checkpoint of {run} can be used: {problem}")
    have = ", ".join(str(entry.step) for entry in store.entries(root)) or "none; `megatron-stable pretrain` writes them"
    wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    raise DataError(f"{run} has {wanted}; it has {have}")


def summary(entry: store.Entry, problem: str | None, verified: bool) -> dict[str, Any]:
    """A checkpoint in plain values, for ``checkpoints --json``."""
    manifest = entry.manifest
    size = None
    if manifest is not None:
        size = manifest.bytes + (entry.directory / MANIFEST).stat().st_size
    return {
        "step": entry.step,
        "directory": str(entry.directory),
        "bytes": size,
        "health": "abandoned" if entry.abandoned else WORDS[verdict(entry.directory)],
        "layout": manifest.layout.model_dump() if manifest else None,
        "complete": problem is None,
        "verified": verified and problem is None,
        "problem": problem,
    }
