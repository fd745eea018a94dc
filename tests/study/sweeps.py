"""Sweeps that never ran, of which the truth is known: tables and probes as `sweep` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from megatron_stable.study.table import MEASURED, RATE, SEED, Row, write_table

RATES = tuple(10.0**x for x in np.arange(-3.5, -0.4, 0.5).round(1))
SIZES = tuple(1e6 * 4.0**i for i in range(5))
STEPS, WARM = 1000, 100


def logit(size: float, rate: float) -> float:
    """log10 of the largest attention logit: a parabola for each learning rate, as in arXiv 2309.14322."""
    x = np.log10(size / 1e6)
    return float(2.2 + 0.9 * np.log10(rate / 1e-3) + (0.5 + 0.15 * np.log10(rate / 1e-3)) * x + 0.05 * x**2)


def sweep(
    seeds: int = 2,
    noise: float = 0.05,
    random: int = 0,
    recipes: tuple[str, ...] = ("baseline", "qk_norm"),
    sizes: tuple[float, ...] = SIZES,
    **fields: Any,
) -> tuple[list[Row], list[tuple[str, int, str, float]]]:
    """Rows and measurements. The baseline diverges beyond a logit of 10⁴, qk_norm where 0.2 of the learning rate is."""
    draw = np.random.default_rng(random)
    rows, measured = [], []
    for recipe in recipes:
        for size in sizes:
            for rate in RATES:
                for seed in range(seeds):
                    name = f"{recipe}-{size:g}-{rate:g}-{seed}"
                    value = logit(size, rate) + noise * draw.standard_normal()
                    bounded = recipe == "qk_norm"
                    frontier = -0.9 - 0.15 * np.log10(size / 1e6)
                    at = np.log10(rate) + noise * draw.standard_normal()
                    bad = bool(at > frontier if bounded else value > 4)
                    best = np.log10(rate) + 2.2 + 0.2 * np.log10(size / 1e6)
                    loss = float(4 * (size / 1e6) ** -0.05 + 0.1 * best**2 + 0.003 * draw.standard_normal())
                    rows.append(
                        {
                            "name": name,
                            "status": "diverged" if bad else "finished",
                            "parameters": int(size),
                            "steps": STEPS,
                            "initial_loss": 9.0,
                            "loss": 9.0 if bad else loss,
                            "score": 9.0 if bad else loss,
                            "diverged_at": 300 if bad else None,
                            "size": f"{size / 1e6:g}m",
                            RATE: rate,
                            SEED: seed,
                            "model.recipe": recipe,
                            "model.hidden": int(size**0.5),
                            "model.qk_norm": bounded,
                            "optimizer.eps": 1e-8,
                            "schedule.warmup_steps": WARM,
                            "run.steps": STEPS,
                            "loss.z_loss": 0.0,
                            **fields,
                        }
                    )
                    gradient = -6 - 0.4 * np.log10(size / 1e6) - 0.2 * np.log10(rate / 1e-3)
                    for step in range(50, STEPS + 1, 50):
                        later = noise * draw.standard_normal()
                        measured.append((name, step, "attention/max_logit/layer_00", 10 ** (value + step / WARM - 1)))
                        measured.append((name, step, "attention/max_logit/layer_01", 10 ** (value + step / WARM - 0.7)))
                        measured.append((name, step, "grad_rms/fc1/layer_00", 10 ** (gradient + later)))
    return rows, measured


def write(directory: Path, rows: list[Row], measured: list[tuple[str, int, str, float]]) -> Path:
    """As `sweep` leaves them."""
    directory.mkdir(exist_ok=True)
    write_table(rows, directory)
    columns = dict(zip(("run", "step", "tag", "value"), map(list, zip(*measured, strict=True)), strict=True))
    table = pa.table(columns)
    for i, name in ((0, "run"), (2, "tag")):
        table = table.set_column(i, name, table[name].dictionary_encode())
    pa.parquet.write_table(table, directory / MEASURED)
    return directory
