"""What became of a run of a sweep: its row of the table, and what was measured in it, from its directory alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

from megatron_stable.config.schema import Config
from megatron_stable.errors import DivergenceError, LossScaleError
from megatron_stable.files import write_file
from megatron_stable.model.transformer import parameter_count
from megatron_stable.persisted import Persisted, read_as
from megatron_stable.records.directory import RunDirectory
from megatron_stable.records.metrics import Record, latest, read_metrics
from megatron_stable.stability.collapse import Collapse
from megatron_stable.stability.events import Drop, EarlyWarning, Event, Spike, Stop
from megatron_stable.stability.probes import parse, tag
from megatron_stable.study.grid import Cell
from megatron_stable.study.table import SMALLEST, Row

ENDED = "ended.json"  # in the directory of a run that a sweep need not train any more
LAST = 10  # a run's end is its last part of so many
MOST = 10.0  # of a rise: it is infinite where the loss is

Measured = tuple[int, str, float | None]  # step, tag, value


class Ended(Persisted):
    """How a run ended.

    Attributes:
        reason: Why it did not reach its last step.
    """

    status: Literal["finished", "diverged", "failed"]
    reason: str | None = None


def read_ended(run: Path) -> Ended | None:
    """How a run ended; ``None``: it has not. DataError: what says so is damaged."""
    path = run / ENDED
    if path.is_file():
        return read_as(Ended, path)
    # killed between the divergence and the note of it: trained on, it would diverge again, but elsewhere
    last = next(reversed(RunDirectory(run).ledger.read()), None)
    codes = (DivergenceError.exit_code, LossScaleError.exit_code)
    if isinstance(last, Stop) and last.exit_code in codes:
        return Ended(status="diverged", reason=last.reason.partition("\n")[0])
    return None


def write_ended(run: Path, ended: Ended) -> None:
    """Say how a run ended. DataError: it cannot be written."""
    write_file(run / ENDED, f"{ended.model_dump_json()}\n".encode())


def outcome(cell: Cell) -> tuple[Row, list[Measured]]:
    """The row of a run, wherever it stands, and its measurements.

    Raises:
        DataError: Its directory cannot be read.
    """
    config, run = cell.config, RunDirectory(cell.config.run.directory)
    ended = read_ended(run.path)
    records = latest(read_metrics(run.metrics))
    total, inner = parameter_count(config.model)
    results: Row = {
        "name": cell.name,
        "status": ended.status if ended else "unfinished",
        "reason": ended and ended.reason,
        "parameters": inner,
        "parameters_total": total,
        "steps": records[-1]["step"] if records else 0,
    }
    results |= _losses(records, config, results["status"]) | _events(run.ledger.read())
    results |= _speed(records, config)
    measured = list(_measured(records, config))
    fields = {key: value for key, value in config.by_key().items() if key != "run.directory"}
    return {**results, **cell.labels, **_ends(measured, results["steps"]), **fields}, measured


def _losses(records: Sequence[Record], config: Config, status: str) -> Row:
    losses = [record.get("loss") for record in records]
    collapse = Collapse()
    for record, loss in zip(records, losses, strict=True):
        collapse = collapse.followed_by(record["step"], loss, config.guard.collapse or 0.5)
    last = losses[-ceil(len(losses) / LAST) :] if losses else []
    train = None if not last or None in last else fmean(loss for loss in last if loss is not None)
    validated = (record["validation_loss"] for record in reversed(records) if "validation_loss" in record)
    validation: float | None = next(validated, None)
    loss = train if validation is None else validation
    first = collapse.first
    return {
        "initial_loss": first,
        "lowest_loss": collapse.lowest,
        "train_loss": train,
        "validation_loss": validation,
        "loss": loss,
        "score": _score(loss, first, status),
        "rise": None if first is None else min(collapse.rise, MOST),
        "diverged_at": collapse.onset,
    }


def _score(loss: float | None, first: float | None, status: str) -> float | None:
    if first is None or status in ("failed", "unfinished"):
        return None
    return first if loss is None or status == "diverged" else min(loss, first)


def _events(events: Iterable[Event]) -> Row:
    """Counts; what a run told again after it was resumed counts once."""
    known = list(events)
    spikes = {event.onset for event in known if isinstance(event, Spike) and event.series == "loss"}
    drops = {event.step for event in known if isinstance(event, Drop)}
    warnings = {(event.rule, event.tag) for event in known if isinstance(event, EarlyWarning)}
    first = min((event.step for event in known if isinstance(event, EarlyWarning)), default=None)
    return {
        "spikes": len(spikes), "dropped_updates": len(drops), "warnings": len(warnings), "first_warning": first
    }  # fmt: skip


def _speed(records: Sequence[Record], config: Config) -> Row:
    speeds = [record["tokens_per_second"] for record in records if record.get("tokens_per_second")]
    if not speeds:
        return {"seconds": None, "tokens_per_second": None}
    seconds = sum(config.tokens_per_step / speed for speed in speeds)
    return {"seconds": seconds, "tokens_per_second": median(speeds)}


def _measured(records: Sequence[Record], config: Config) -> Iterable[Measured]:
    """What was measured at regular steps: which others were depends on when a run was resumed."""
    every = config.logging.probes_every
    for record in records:
        if every and record["step"] % every == 0:
            yield from ((record["step"], key, value) for key, value in record.items() if parse(key) is not None)


def _ends(measured: Sequence[Measured], steps: int) -> Row:
    """Means over the last tenth of a run, or its last measurement; of the layers, the most telling one."""
    behind = min(steps - ceil(steps / LAST), max((step for step, *_ in measured), default=0) - 1)
    series: dict[str, list[float]] = {}
    for step, key, value in measured:
        if step > behind:
            series.setdefault(key, []).extend([] if value is None else [value])
    layers: dict[str, list[float]] = {}
    for key, values in series.items():
        where = parse(key)
        assert where is not None
        if where.head is None:
            column = tag(where.probe.name, where.point)
            layers.setdefault(column, []).extend([fmean(values)] if values else [])
    found: dict[str, Any] = {}
    for column, means in layers.items():
        name = column.split("/")[0]
        choose = min if name in SMALLEST or column in SMALLEST else max
        found[column] = choose(means) if means else None
    return found
