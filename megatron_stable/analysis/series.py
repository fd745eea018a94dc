"""A run's series, such as its loss by step: from its own ``metrics.jsonl``, or from anybody's TensorBoard directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_stable.analysis.event_files import EventFile, Scalars
from megatron_stable.errors import ConfigError, DataError
from megatron_stable.records.directory import require_known_format
from megatron_stable.records.metrics import batch_of, read_metrics

METRICS = "metrics.jsonl"
# what trainers call the training loss and the norm of the whole gradient, in the order in which they are looked for
LOSSES = (
    "train/loss", "lm loss", "lm-loss-training/lm loss", "train/lm_loss", "train/CE loss", "loss", "train_loss",
    "training_loss", "loss/train", "Loss/train", "training/loss", "loss/train/total", "reduced_train_loss",
    "loss_metrics/global_avg_loss", "global_avg_loss", "lm_loss",
)  # fmt: skip
GRADIENT_NORMS = (
    "train/grad_norm", "grad_norm", "grad-norm", "grad-norm/grad-norm", "optim/total grad norm", "l2_norm/grad/global",
    "grad/norm/total", "gradient_norm", "train/gradient_norm", "train/grad-norm", "gnorm",
)  # fmt: skip


@dataclass(frozen=True)
class Series:
    """Numbers by step.

    Attributes:
        name: The tag or key.
        steps: int64 ``[n]``, strictly increasing.
        values: float64 ``[n]``; NaN or an infinity where the value was not finite.
        data_steps: int64 ``[n]``, the position in the data order at each step, if the run recorded it.
        samples: int64 ``[n, 2]``, the first sample of each step and the one behind its last; -1 where not recorded.
        notes: What a user should know about how it was read.
    """

    name: str
    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    data_steps: NDArray[np.int64] | None = None
    samples: NDArray[np.int64] | None = None
    notes: tuple[str, ...] = ()

    def data_step(self, step: int) -> int | None:
        """The data step of a step; of one that was not recorded, counted from the next that was."""
        if self.data_steps is None:
            return None
        at = self._recorded(step)
        return int(self.data_steps[at] + step - self.steps[at])

    def batch(self, step: int) -> tuple[int, int] | None:
        """The samples of a step, as [first, end); of one that was not recorded, counted from the next that was."""
        at = self._recorded(step)
        if self.samples is None or (self.samples[at] < 0).any():
            return None
        first, end = self.samples[at].tolist()
        off = (step - int(self.steps[at])) * (end - first)
        return first + off, end + off

    def _recorded(self, step: int) -> int:
        return min(int(np.searchsorted(self.steps, step)), len(self.steps) - 1)


def read_series(path: Path, tag: str | None = None, known: Sequence[str] = LOSSES) -> Series:
    """A series of a run. Where a run went back, what it wrote from that step on before is superseded.

    Args:
        path: A run's directory, any directory that holds event files of TensorBoard, or one such file.
        tag: Its name; by default the first of ``known`` that is there.

    Raises:
        DataError: There is nothing to read, or it cannot be read.
        ConfigError: The tag is not there, none is given and none of ``known`` is there, or it is several runs' at once.
    """
    if (path / METRICS).is_file():
        require_known_format(path)
        return _read_metrics(path / METRICS, tag, known)
    return _read_events(path, tag, known)


def read_gradient_norm(path: Path, tag: str | None = None) -> Series | None:
    """The norm of the gradient, as `read_series`; ``None`` if no tag is given and none of `GRADIENT_NORMS` is there."""
    try:
        return read_series(path, tag, GRADIENT_NORMS)
    except ConfigError:
        if tag is None:
            return None
        raise


def is_gradient_norm(name: str) -> bool:
    """Whether a series of this name is a norm, whose noise multiplies: the detector looks at its logarithm."""
    return name in GRADIENT_NORMS or "norm" in name.lower()


def _read_metrics(path: Path, tag: str | None, known: Sequence[str]) -> Series:
    key = tag if tag is not None else next(name for name in ("loss", "grad_norm") if name in known)
    rows: list[tuple[int, float, int, tuple[int, int]]] = []
    keys, broken = set[str](), list[int]()
    for record in read_metrics(path, broken):
        step: int = record["step"]
        try:
            if key in record:
                value = record[key]
                batch = batch_of(record)
                span = (batch[0][0], batch[-1][1]) if batch else (-1, -1)
                number = np.nan if value is None else float(value)
                rows.append((step, number, int(record.get("data_step", step)), span))
            keys |= record.keys()
        except (TypeError, ValueError):
            broken.append(step)
    if not keys:
        raise DataError(f"{path} holds no step yet: there is nothing to search")
    if not rows:
        raise ConfigError(f"{path} has no {key!r}{_instead(key, keys)}")
    steps, values, data_steps, samples = (
        np.array(column, dtype)
        for column, dtype in zip(zip(*rows, strict=True), (np.int64, float, np.int64, np.int64), strict=True)
    )
    kept = _kept(steps)
    notes = [f"{path}: {len(broken)} lines are no whole records of numbers and were left out"] if broken else []
    notes += _superseded(key, kept)
    return Series(key, steps[kept], values[kept], data_steps[kept], samples[kept], tuple(notes))


def _read_events(path: Path, tag: str | None, known: Sequence[str]) -> Series:
    files = [EventFile(file) for file in _event_files(path)]
    for name in known if tag is None else (tag,):
        if parts := _with_tag(files, name):
            break
    else:
        raise _absent(path, files, tag, known)
    notes = _check_one_run(path, parts)
    scalars = [part for _, part in sorted(parts, key=lambda item: item[1].times[0])]
    steps = np.concatenate([part.steps for part in scalars])
    values = np.concatenate([part.values for part in scalars])
    real = ~np.concatenate([part.restarts for part in scalars])
    kept = _kept(steps) & real
    notes += _superseded(name, kept[real])
    if tag is None:
        notes.insert(0, f"took {name!r}, as no tag was named")
    notes += [note for file in files for note in file.notes]
    return Series(name, steps[kept], values[kept], notes=tuple(notes))


def _with_tag(files: Sequence[EventFile], tag: str) -> list[tuple[Path, Scalars]]:
    """Directory and content of the files in the directories that hold a tag; a restart may be all that a file holds."""
    directories = {file.path.parent for file in files if file.mentions(tag)}
    parts = [(file.path.parent, file.scalars(tag)) for file in files if file.path.parent in directories]
    holders = {directory for directory, part in parts if not part.restarts.all()}
    return [(directory, part) for directory, part in parts if directory in holders and part.steps.size]


def _absent(path: Path, files: Sequence[EventFile], tag: str | None, known: Sequence[str]) -> Exception:
    """What to raise where a tag is not."""
    tags = set[str]().union(*(file.tags() for file in files))
    notes = "".join(f"\n  {note}" for file in files for note in file.notes)
    if not tags:
        return DataError(f"{path} holds no scalars: its event files are empty, cut off, or of another kind{notes}")
    wanted = f"none of the tags that are known, such as {known[0]!r}" if tag is None else f"no tag {tag!r}"
    return ConfigError(f"{path} has {wanted}{_instead(tag or known[0], tags)}{notes}")


def _event_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(path.rglob("*tfevents*")) if path.is_dir() else []
    if not files:
        what = "holds neither metrics.jsonl nor event files of TensorBoard" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {what}: name a run's directory, or a directory of files named events.out.tfevents.…")
    return files


def _check_one_run(path: Path, parts: Sequence[tuple[Path, Scalars]]) -> list[str]:
    """Several directories are one run, started anew in each, unless they were written at the same time."""
    spans: dict[Path, tuple[float, float]] = {}
    for directory, part in parts:
        first, last = spans.get(directory, (np.inf, -np.inf))
        spans[directory] = min(first, part.times.min()), max(last, part.times.max())
    if len(spans) == 1:
        return []
    ordered = sorted(spans, key=lambda directory: spans[directory])
    names = [str(directory.relative_to(path)) for directory in ordered]
    if any(spans[before][1] > spans[after][0] for before, after in pairwise(ordered)):
        listed = "".join(f"\n  {path / name}" for name in names)
        raise ConfigError(f"{path} holds several runs that were written at the same time; name one of them:{listed}")
    return [f"read as one run that was started anew in each of: {', '.join(names)}"]


def _superseded(name: str, kept: NDArray[np.bool_]) -> list[str]:
    """A note, if there is anything to note."""
    count = int((~kept).sum())
    return [f"{count:,} values of {name!r} were superseded where the run went back to an earlier step"] if count else []


def _kept(steps: NDArray[np.int64]) -> NDArray[np.bool_]:
    """What is not superseded: a step, in the order of writing, supersedes itself and all above it before."""
    later = np.append(np.minimum.accumulate(steps[::-1])[::-1][1:], np.iinfo(np.int64).max)
    return steps < later


def _instead(wanted: str, there: set[str]) -> str:
    """The end of a message: the nearest name, and what there is."""
    near = get_close_matches(wanted, there, 1, 0.5)
    listed = ", ".join(repr(name) for name in sorted(there)[:40]) + (" …" if len(there) > 40 else "")
    return f"{f'; did you mean {near[0]!r}?' if near else ':'} name one with --tag; there are {listed}"
