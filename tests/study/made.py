"""Tables of sweeps that nobody ran: their losses, and at which learning rates they diverge, are known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import product
from math import log, log10
from pathlib import Path
from typing import Any

from megatron_stable.config.schema import Config
from megatron_stable.study.table import MEASURED, RATE, SEED, Row, write_table

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SIZES = {"d64": 98_304, "d128": 786_432, "d256": 6_291_456}
EDGES = {"baseline": {"d64": 0.1, "d128": 0.03, "d256": 0.01}, "qk_norm": {"d64": 1.0, "d128": 1.0, "d256": 0.3}}
INITIAL = 8.0
CONFIG = Config().by_key()


def run(name: str, rate: float, score: float | None, seed: int = 1, **more: Any) -> Row:
    """A row; a score of ``INITIAL`` or more: it diverged."""
    results = {
        "name": name, "status": "finished", "reason": None, "parameters": 1000, "steps": 200, "initial_loss": INITIAL,
        "loss": score, "score": score, "rise": 0.01, "run.steps": 200,
    }  # fmt: skip
    if score is None:
        results |= {"status": "failed", "reason": "killed", "initial_loss": None, "rise": None}
    elif score >= INITIAL:
        results |= {"status": "diverged", "reason": "the loss rose", "score": INITIAL, "rise": 0.9}
    return results | {RATE: rate, SEED: seed} | more


def loss_at(size: str, recipe: str, rate: float, seed: int) -> float:
    """A parabola in log η around 0.003, lower for a larger model; above its edge, the initial loss."""
    if rate > EDGES[recipe][size] * (3 if seed == 3 else 1):
        return INITIAL
    return 6 - 0.35 * log10(SIZES[size]) + 0.12 * log10(rate / 3e-3) ** 2 + 0.004 * seed


def sweep(
    sizes: Iterable[str] = SIZES, recipes: Iterable[str] = EDGES, seeds: Iterable[int] = (1, 2, 3),
    score: Callable[[str, str, float, int], float | None] = loss_at,
) -> list[Row]:  # fmt: skip
    """A sweep over size, recipe, learning rate and seed, of runs that all ended."""
    rows = []
    for size, recipe, rate, seed in product(sizes, recipes, RATES, seeds):
        measured = {
            "attention/max_logit": (0.001 if recipe == "qk_norm" else 1) * SIZES[size] ** 0.5 * rate * 100 + 5,
            "grad_rms/fc1": 1e-3 / SIZES[size] ** 0.7 / rate**0.3,
        }
        axes = {"size": size, "recipe": recipe, "parameters": SIZES[size]}
        row = run(f"{size}-{recipe}-{rate:g}-{seed}", rate, score(size, recipe, rate, seed), seed, **axes)
        rows.append(CONFIG | row | measured)
    return rows


def write_sweep(directory: Path, rows: list[Row], measured: Mapping[str, Any] | None = None) -> Path:
    """A sweep's directory."""
    directory.mkdir(parents=True)
    write_table(rows, directory)
    if measured is not None:
        import pyarrow as pa
        import pyarrow.parquet

        texts = {name: pa.array(measured[name]).dictionary_encode() for name in ("run", "tag")}
        pa.parquet.write_table(pa.table({**measured, **texts}), directory / MEASURED)
    return directory


def outputs(rows: Iterable[Row], steps: int = 100, layers: int = 2) -> dict[str, list[Any]]:
    """Output norms over time, that of a run which diverged doubling every 20 steps, as probes.parquet has them."""
    points = ("qkv", "proj", "fc1", "fc2")
    table = [
        (row["name"], step, f"output_norm/{point}/layer_{layer:02}", (4 + i + layer) * grown)
        for row in rows
        for step in range(10, steps + 1, 10)
        for grown in [2 ** (step / 20) if row["status"] == "diverged" else 1 + log(step) / 20]
        for i, point in enumerate(points)
        for layer in range(layers)
    ]
    return dict(zip(("run", "step", "tag", "value"), map(list, zip(*table, strict=True)), strict=True))
