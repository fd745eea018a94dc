"""Directories of runs that nobody trained."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import cos
from pathlib import Path
from typing import Any

from megatron_stable.config.load import dump_config, load_config
from megatron_stable.records.ledger import Ledger
from megatron_stable.stability.events import Event
from megatron_stable.stability.probes import PROBES, places

LAYERS = 3


def record(step: int, **more: Any) -> dict[str, Any]:
    """What a step records, without probes."""
    numbers = {
        "loss": 2 + 5 / step, "z_loss": 0.0, "grad_norm": 1 + 0.1 * cos(step), "learning_rate": 1e-3, "loss_scale": 1.0,
        "tokens": 512 * step, "tokens_per_second": 1e4 + 100 * cos(step), "skipped": False, "data_step": step,
        "samples": [[8 * step, 8 * step + 8]],
    }  # fmt: skip
    return {"step": step, **numbers, **more}


def probes(step: int, layers: int = LAYERS) -> dict[str, float]:
    """A value for every probe, of all layers."""
    tags = [where.tag for probe in PROBES.values() for where in places(probe, layers)]
    return {tag: round(0.5 + (i % 7) + 0.3 * cos(step + i), 5) for i, tag in enumerate(tags)}


def make_run(
    run: Path,
    records: Iterable[Mapping[str, Any]],
    events: Iterable[Event] = (),
    settings: Iterable[str] = (),
    flights: Mapping[str, Iterable[Mapping[str, Any]]] | None = None,
) -> Path:
    """A run's directory with these records, events, settings and files of the flight recorder."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(load_config(None, ["model.size=tiny", *settings])))
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    for event in events:
        Ledger(run / "ledger.jsonl").write(event)
    for name, rows in (flights or {}).items():
        (run / "flight").mkdir(exist_ok=True)
        (run / "flight" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run
