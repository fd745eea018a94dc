"""How a run stands, from its directory alone: whether it is being trained, how far it is, what happened last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from megatron_stable.checkpoint import store
from megatron_stable.config.load import load_config
from megatron_stable.records.directory import RunDirectory, require_known_format, require_run
from megatron_stable.records.metrics import EPOCHS
from megatron_stable.records.presence import last_start, owner

TAIL = 2**16  # bytes from the end of a file in which to look for its last lines at first
EVENTS = 5


class Status(BaseModel):
    """What is known of a run.

    Attributes:
        running: Who trains it, in words; ``None``: nobody.
        hosts: Numbers of ranks by host, while it is being trained.
        address: Where its ranks have met.
        began: When these ranks began, seconds since 1970.
        step, steps: The last that was recorded, and the last that is to come.
        loss, grad_norm, tokens_per_second: Of that step.
        seconds_left: At that rate.
        epochs: How often each source of the data has been read.
        checkpoint: The step that it would go on from.
        orphans: Process ids by rank of those on this machine that live although nobody trains it.
        events: The last ones, in words, oldest first.
    """

    running: str | None
    hosts: dict[str, list[int]] = {}
    address: str | None = None
    began: float | None = None
    step: int = 0
    steps: int
    loss: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    epochs: dict[str, float] = {}
    checkpoint: int | None = None
    orphans: dict[int, int] = {}
    events: list[str] = []


def status_of(run: Path) -> Status:
    """The status of a run. It costs the same whatever the run's length, but for a look at its checkpoints.

    Raises:
        ConfigError, DataError: It is no run's directory, or cannot be read.
    """
    require_run(run)
    require_known_format(run)
    directory, config = RunDirectory(run), load_config(run / "config.yaml")
    found, start = owner(run), last_start(run)
    current = start if start and found and start.led_by(found) else None
    last = _last_record(directory.metrics)
    rate, left = last.get("tokens_per_second"), config.run.steps - last.get("step", 0)
    tokens = config.batch.global_size * config.model.sequence_length
    whole = [entry.step for entry in store.entries(directory.checkpoints) if entry.usable]
    return Status(
        running=str(found) if found else None,
        hosts=current.hosts() if current else {},
        address=current.address if current else None,
        began=current.began if current else None,
        step=last.get("step", 0),
        steps=config.run.steps,
        loss=last.get("loss"),
        grad_norm=last.get("grad_norm"),
        tokens_per_second=rate,
        seconds_left=left * tokens / rate if found and rate else None,
        epochs={key.removeprefix(EPOCHS): last[key] for key in last if key.startswith(EPOCHS)},
        checkpoint=max(whole, default=None),
        orphans=start.alive_here() if start and not found else {},
        events=[event.sentence() for event in list(directory.ledger.read())[-EVENTS:]],
    )


def _last_record(path: Path) -> dict[str, Any]:
    """The last whole line of a run's metrics; what was measured in a large model makes a long one."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        size, tail = path.stat().st_size, TAIL
        while True:
            file.seek(max(0, size - tail))
            for line in reversed(file.read(tail).split(b"\n")):
                try:
                    value = json.loads(line)
                except ValueError:
                    continue
                if isinstance(value, dict) and type(value.get("step")) is int:
                    return value
            if tail >= size:
                return {}
            tail *= 8
