"""A step of a run: what was recorded of it, its place in the data order, and the configuration that it had."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from megatron_stable.checkpoint import store
from megatron_stable.config.load import load_config, parse_config
from megatron_stable.config.schema import Config
from megatron_stable.data import Course, Stages
from megatron_stable.errors import ConfigError, DataError
from megatron_stable.records.directory import RunDirectory, require_known_format
from megatron_stable.records.metrics import Record, batch_of, read_metrics
from megatron_stable.records.stages import read_stages
from megatron_stable.stability.events import Resume

# on a batch, and on what its loss is of; besides the sequence length, which cannot change in a run
DECIDING = (
    "run.seed", "data.document_mask", "data.end_of_document", "data.repetition_filter", "data.repetition_periods",
)  # fmt: skip
SOURCES = ("data.train", "data.stages")  # and these, where a run has not noted the stages of its data


class Position(NamedTuple):
    """A step of a run.

    Attributes:
        step: The optimizer step; ``None``: none trained on this data step.
        data_step: Its place in the data order.
        samples: Of that order, in its batch: [first, end) of each piece.
        record: What ``metrics.jsonl`` has about it.
        notes: What the user should know about it.
        data_steps: That hold its samples, as the run counts them today, first and last: what to name to `skip`.
    """

    step: int | None
    data_step: int
    samples: tuple[tuple[int, int], ...]
    record: Record | None
    notes: tuple[str, ...]
    data_steps: tuple[int, int]


def find_step(run: str | Path, step: int | None = None, data_step: int | None = None) -> Position:
    """A step of a run by its number or by its data step, from ``metrics.jsonl``; where that has no line about it, from
    the manifest of the newest checkpoint.

    Raises:
        ConfigError: There is no such step, or both or neither is given.
    """
    if (step is None) == (data_step is None):
        raise ConfigError("name one: a step of the run with --step, or a place in its data with --data-step")
    lines = list(read_metrics(RunDirectory(run).metrics))
    stored = [entry for entry in store.entries(Path(run) / "checkpoints") if entry.usable and entry.manifest]
    course = stored[-1].manifest.state.course if stored and stored[-1].manifest else None
    known = {line["step"]: line for line in lines if batch_of(line) is not None}
    last = max([*known, *(entry.step for entry in stored)], default=0)
    if data_step is not None:
        return _by_data_step(run, data_step, lines, course, last)
    assert step is not None
    if not 1 <= step <= last:
        have = f"it has trained steps 1 to {last}" if last else "it has recorded no step yet"
        raise ConfigError(f"{run} has no step {step}: {have}; --data-step names any place in its data")
    record = known.get(step)
    if record is not None:
        places = {line["data_step"] for line in lines if line["step"] == step and batch_of(line)}
        others = sorted(places - {record["data_step"]})
        notes = [f"before a rollback, step {step} was data step {other}: see --data-step {other}" for other in others]
        batch, place = batch_of(record) or (), record["data_step"]
        today = course.data_steps(batch[0][0], batch[-1][1]) if course is not None else (place, place)
        return Position(step, place, batch, record, tuple(notes), today)
    if course is None:
        raise ConfigError(f"{run} says nowhere which samples step {step} trained on; name a place with --data-step")
    batch = tuple((piece.start, piece.stop) for piece in course.samples(step))
    today, notes = course.data_steps(batch[0][0], batch[-1][1]), ["by the skip windows of the newest checkpoint"]
    return Position(step, today[0], batch, None, tuple(notes), today)


def _by_data_step(run: str | Path, data_step: int, lines: list[Record], course: Course | None, last: int) -> Position:
    if data_step < 1:
        raise ConfigError(f"data steps count from 1, got {data_step}")
    recorded = (line for line in reversed(lines) if line.get("data_step") == data_step and batch_of(line))
    record = next(recorded, None)
    if course is None:
        course = Course.begin(configuration(run).batch.global_size)
    batch = (record and batch_of(record)) or (course.stretch(data_step, data_step),)
    windows, notes = course.windows, []
    step = record["step"] if record is not None else course.step(windows.sample(windows.kept(batch[0][0])))
    if all(windows.kept(first) == windows.kept(end) for first, end in batch):
        notes.append(f"data step {data_step} is in a skip window: the run as it is now does not train on it")
        step = record["step"] if record is not None else None
    elif step is not None and step > last:
        notes.append(f"the run has not come to data step {data_step} yet")
    today = course.data_steps(batch[0][0], batch[-1][1])
    return Position(step if step is not None and step <= last else None, data_step, batch, record, tuple(notes), today)


def configuration(run: str | Path) -> Config:
    """That of a run.

    Raises:
        DataError: There is no such run.
    """
    path = RunDirectory(run).config
    if not path.is_file():
        raise DataError(f"no run in {run}: name the run.directory of a run, the one that holds config.yaml")
    require_known_format(Path(run))
    return load_config(path)


def stages_of(run: str | Path, record: Record | None = None) -> Stages | None:
    """Which source each sample of a run comes from; ``None``: an older version trained it, and did not note that.

    Args:
        record: Of a step. Where the run has gone back behind it, and may have another blend since, it is known by the
            checkpoint that the run went back to.

    Raises:
        DataError: What the run has noted cannot be used.
    """
    noted = read_stages(Path(run))
    if noted is not None and (record is None or len(noted.stages) == 1):
        return noted
    stored = [entry.manifest for entry in store.entries(Path(run) / "checkpoints") if entry.usable and entry.manifest]
    if noted is None:
        return stored[-1].state.stages if stored else None
    again = _trained_again(run, record)
    before = [manifest.state.stages for manifest in stored if again is not None and manifest.step < again]
    return (before[-1] if before else None) or noted


def _trained_again(run: str | Path, record: Record | None) -> int | None:
    """The step with which the run went on when it had gone back behind a record; ``None``: it has not."""
    lines = list(read_metrics(RunDirectory(run).metrics))
    if record not in lines:
        return None
    later = lines[len(lines) - lines[::-1].index(record) :]
    return next((line["step"] for line in later if line["step"] <= record["step"]), None)


def as_it_was(
    run: str | Path, config: Config, step: int | None, deciding: Collection[str] = (*DECIDING, *SOURCES)
) -> tuple[Config, list[str]]:
    """The configuration with what decides on a batch as it was at a step, which resumes since may have changed; and
    notes on that. The ledger knows."""
    values, notes = config.model_dump(mode="json"), []
    if step is None:
        return config, []
    for event in reversed(RunDirectory(run).ledger.read()):
        if not isinstance(event, Resume) or event.step < step:
            continue
        for key, (before, now) in event.changed.items():
            if key in deciding:
                section, field = key.split(".")
                values[section][field] = before
                notes.append(f"{key} was {before} at step {step}, and {now} from step {event.step + 1} on")
    return parse_config(values), notes
