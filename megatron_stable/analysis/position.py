"""A step of a run: what was recorded of it, its place in the data order, and the configuration that it had."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from megatron_stable.checkpoint import store
from megatron_stable.config.load import load_config, parse_config
from megatron_stable.config.schema import Config
from megatron_stable.data import SkipWindows
from megatron_stable.errors import ConfigError, DataError
from megatron_stable.records.directory import RunDirectory, require_known_format
from megatron_stable.records.metrics import Record, read_metrics
from megatron_stable.stability.events import Resume

DECIDING = ("run.seed", "batch.global_size", "data.train")  # besides the sequence length, which cannot change in a run


class Position(NamedTuple):
    """A step of a run.

    Attributes:
        step: The optimizer step; ``None``: none trained on this data step.
        data_step: Its place in the data order.
        record: What ``metrics.jsonl`` has about it.
        notes: What the user should know about it.
    """

    step: int | None
    data_step: int
    record: Record | None
    notes: tuple[str, ...]


def find_step(run: str | Path, step: int | None = None, data_step: int | None = None) -> Position:
    """A step of a run by its number or by its data step, from ``metrics.jsonl``; where that has no line about it, from
    the skip windows in the manifest of the newest checkpoint.

    Raises:
        ConfigError: There is no such step, or both or neither is given.
    """
    if (step is None) == (data_step is None):
        raise ConfigError("name a step of the run with --step, or a place in its data with --data-step, not both")
    lines = list(read_metrics(RunDirectory(run).metrics))
    stored = [entry for entry in store.entries(Path(run) / "checkpoints") if entry.usable and entry.manifest]
    windows = SkipWindows(stored[-1].manifest.state.skip_windows) if stored and stored[-1].manifest else None
    known = {line["step"]: line for line in lines}
    last = max([*known, *(entry.step for entry in stored)], default=0)
    if data_step is not None:
        return _by_data_step(data_step, lines, windows or SkipWindows(), last)
    assert step is not None
    if not 1 <= step <= last:
        have = f"it has trained steps 1 to {last}" if last else "it has recorded no step yet"
        raise ConfigError(f"{run} has no step {step}: {have}; --data-step names any place in its data")
    record = known.get(step)
    if record is not None and isinstance(record.get("data_step"), int):
        places = {line.get("data_step") for line in lines if line.get("step") == step} - {record["data_step"]}
        others = sorted(place for place in places if isinstance(place, int))
        notes = [f"before a rollback, step {step} was data step {other}: see --data-step {other}" for other in others]
        return Position(step, record["data_step"], record, tuple(notes))
    if windows is None:
        raise ConfigError(f"{run} says nowhere which data step {step} was; name it with --data-step")
    return Position(step, windows.data_step(step), record, ("by the skip windows of the newest checkpoint",))


def _by_data_step(data_step: int, lines: list[Record], windows: SkipWindows, last: int) -> Position:
    if data_step < 1:
        raise ConfigError(f"data steps count from 1, got {data_step}")
    record = next((line for line in reversed(lines) if line.get("data_step") == data_step), None)
    step = record["step"] if record is not None else windows.step(data_step)
    notes = []
    if data_step in windows:
        notes.append(f"data step {data_step} is in a skip window: the run as it is now does not train on it")
    elif step is not None and step > last:
        notes.append(f"the run has not come to data step {data_step} yet")
    return Position(step if step is not None and step <= last else None, data_step, record, tuple(notes))


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


def as_it_was(run: str | Path, config: Config, step: int | None) -> tuple[Config, list[str]]:
    """The configuration with what decides on a batch as it was at a step, which resumes since may have changed; and
    notes on that. The ledger knows."""
    values, notes = config.model_dump(mode="json"), []
    if step is None:
        return config, []
    for event in reversed(RunDirectory(run).ledger.read()):
        if not isinstance(event, Resume) or event.step < step:
            continue
        for key, (before, now) in event.changed.items():
            if key in DECIDING:
                section, field = key.split(".")
                values[section][field] = before
                notes.append(f"{key} was {before} at step {step}, and {now} from step {event.step + 1} on")
    return parse_config(values), notes
