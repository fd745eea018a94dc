"""What a forecast goes by: of each run its size, learning rate and seed, whether it diverged, and what it measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_stable.errors import ConfigError
from megatron_stable.files import explain_os_errors
from megatron_stable.study.criteria import ENDED, best_of, diverged
from megatron_stable.study.scaling import Array
from megatron_stable.study.table import MEASURED, RATE, SEED, Row, axes

Series = tuple[Array, Array]  # steps, ascending, and values
Measured = Mapping[str, Mapping[str, Series]]  # by run and tag
Layers = Literal["first", "largest"]

# what makes a size; an axis of a sweep that follows from these belongs to the size
SIZE = ("size", "model.size", "model.layers", "model.hidden", "model.heads", "model.kv_heads", "model.ffn_hidden")
BOUNDED = ("model.qk_norm", "model.attention_cap", "optimizer.qk_clip")  # any of them bounds the logits softmax sees
LIKE = ("model.", "optimizer.", "loss.", "batch.global_size", "schedule.")  # what a target shares with the sweep
INDIFFERENT = (
    "model.recipe",  # its fields speak for it
    "model.attention",
    "model.compile",
    "model.activation_checkpointing",
    "optimizer.eps",  # the forecast has the target's
)
EARLY = 0.02  # of the steps: where Wortsman et al. look, at step 2000 of 100,000; where there is no warm-up
NEAR = 0.25  # of the step that is wanted: as far may the step be that was measured
END = 0.1  # of the steps, over which a mean is taken


@dataclass(frozen=True)
class Quantity:
    """A number of a run that goes with its size.

    Attributes:
        tag: Of the probe, without the layer.
        when: early: at one step, about the end of warm-up. late: the mean over the last tenth of the steps.
        layers: Of the first one, the largest over all, or a number that is one in the whole model.
        what: In words.
    """

    tag: str
    when: Literal["early", "late"]
    layers: Literal["first", "largest", "one"]
    what: str


QUANTITIES: dict[str, Quantity] = {
    "max_logit": Quantity("attention/max_logit", "early", "first", "largest attention logit"),
    "grad_rms": Quantity("grad_rms/fc1", "late", "first", "gradient RMS of FC1 of the first block"),
    "log_z": Quantity("logits/logsumexp", "late", "one", "magnitude of log Z"),
    "qkv_norm": Quantity("output_norm/qkv", "early", "largest", "output norm of QKV"),
    "proj_norm": Quantity("output_norm/proj", "early", "largest", "output norm of Proj"),
    "fc2_norm": Quantity("output_norm/fc2", "early", "largest", "output norm of FC2"),
    "residual_norm": Quantity("output_norm/residual", "early", "largest", "norm of the residual stream"),
}


@dataclass(frozen=True)
class Run:
    """A run that ended, well or not.

    Attributes:
        size: Parameters in the blocks.
        values: Of `QUANTITIES`, and ``loss``; those that are missing are in ``missing``, with the reason.
        row: Its row of the table.
    """

    size: float
    rate: float
    seed: int
    diverged: bool
    values: dict[str, float]
    missing: dict[str, str]
    row: Row = field(repr=False)


@dataclass(frozen=True)
class Group:
    """Runs that differ in size, learning rate and seed alone.

    Attributes:
        where: What tells them from other groups, by column of the table.
        runs: In order of learning rate, size, seed.
    """

    where: dict[str, Any]
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """As people read it."""
        return ", ".join(f"{key}={value}" for key, value in self.where.items()) or "all runs"

    @property
    def sizes(self) -> list[float]:
        """Parameters of each size, ascending."""
        return sorted({run.size for run in self.runs})

    @property
    def rates(self) -> list[float]:
        """The grid of learning rates, ascending."""
        return sorted({run.rate for run in self.runs})

    @property
    def bounded(self) -> bool:
        """Whether the recipe bounds attention logits, so that their growth says nothing."""
        return any(run.row.get(key) for run in self.runs for key in BOUNDED)

    def without_largest(self) -> Group:
        """What a forecast of the largest size may see."""
        return Group(self.where, tuple(run for run in self.runs if run.size < self.sizes[-1]))


def read_measured(sweep: Path) -> Measured:
    """What `QUANTITIES` need of a sweep's probes.parquet; nothing where there is none. DataError: it is unreadable."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet

    file = (sweep if sweep.is_dir() else sweep.parent) / MEASURED
    if not file.is_file():
        return {}
    with explain_os_errors("read", file):
        try:
            table = pa.parquet.read_table(file, columns=["run", "step", "tag", "value"])
        except (pa.ArrowInvalid, KeyError) as error:
            raise ConfigError(f"{file} holds no measurements of a sweep: {error}") from error
    wanted = "|".join(quantity.tag for quantity in QUANTITIES.values())
    for column in ("run", "tag"):  # a dictionary, as `sweep` writes them
        table = table.set_column(table.column_names.index(column), column, table[column].cast(pa.string()))
    table = table.filter(pc.match_substring_regex(table["tag"], rf"^({wanted})(/layer_\d+)?$"))
    found: dict[str, dict[str, Series]] = {}
    for (run, tag), steps, values in _series(table.sort_by([("run", "ascending"), ("tag", "ascending")])):
        order = np.argsort(steps, kind="stable")
        found.setdefault(run, {})[tag] = steps[order], values[order]
    return found


def groups(rows: Sequence[Row], measured: Measured, at: int | None = None, layers: Layers = "first") -> list[Group]:
    """The runs of a table that ended, by what tells them apart beside size, learning rate and seed.

    Args:
        at: The step at which early quantities are read; default: the end of each run's warm-up.
        layers: Of the attention logits: of the first layer, as the paper, or the largest over layers.
    """
    rows = [row for row in rows if row.get("status") in ENDED and row.get("parameters")]
    within: list[str] = []
    for axis in axes(rows):
        if axis not in (RATE, SEED, *SIZE) and not _follows(rows, axis, SIZE) and not _follows(rows, axis, within):
            within.append(axis)
    found: dict[str, list[Run]] = {}
    alike: dict[str, list[Row]] = {}  # but for learning rate and seed
    for row in rows:
        alike.setdefault(repr([row.get(axis) for axis in (*within, "parameters", *SIZE)]), []).append(row)
    for cell in alike.values():
        key, best = repr([cell[0].get(axis) for axis in within]), best_of(cell)
        found.setdefault(key, []).extend(_run(row, bool(diverged(row, best)), measured, at, layers) for row in cell)
    ordered = [sorted(runs, key=lambda run: (run.rate, run.size, run.seed)) for _, runs in sorted(found.items())]
    return [Group({axis: runs[0].row.get(axis) for axis in within}, tuple(runs)) for runs in ordered]


def nearest(groups: Sequence[Group], keys: Mapping[str, Any]) -> tuple[Group, list[str]]:
    """The group whose configuration is nearest to one, by dotted key, and the keys in which they still differ."""
    found = [(len(differ := _differences(group, keys)), i, differ) for i, group in enumerate(groups)]
    _, i, differ = min(found)
    return groups[i], differ


def _differences(group: Group, keys: Mapping[str, Any]) -> list[str]:
    differ = []
    for key, value in keys.items():
        if key.startswith(LIKE) and key not in (RATE, *SIZE, *INDIFFERENT) and key in group.runs[0].row:
            held = {json.dumps(run.row[key]) for run in group.runs}
            if len(held) == 1 and not held & {json.dumps(value), json.dumps(json.dumps(value))}:
                differ.append(key)
    return differ


def _series(table: Any) -> Iterable[tuple[tuple[str, str], Array, Array]]:
    """Runs of equal (run, tag) in a table sorted by them."""
    names = list(zip(table["run"].to_pylist(), table["tag"].to_pylist(), strict=True))
    steps, values = table["step"].to_numpy().astype(float), table["value"].to_numpy().astype(float)
    begins = [i for i, name in enumerate(names) if not i or name != names[i - 1]]
    for first, end in zip(begins, [*begins[1:], len(names)], strict=True):
        yield names[first], steps[first:end], values[first:end]


def _follows(rows: Sequence[Row], axis: str, others: Sequence[str]) -> bool:
    """Whether an axis is a function of others, as a batch size that grows with the model."""
    before = {repr([row.get(other) for other in others]) for row in rows}
    return 1 < len(before) == len({repr([row.get(other) for other in (*others, axis)]) for row in rows})


def _run(row: Row, diverged: bool, measured: Measured, at: int | None, layers: Layers) -> Run:
    wanted, own = at or _warm(row), measured.get(row["name"], {})
    values: dict[str, float] = {}
    missing: dict[str, str] = {}

    def take(name: str, value: float | str) -> None:
        if isinstance(value, str):
            missing[name] = value
        elif not math.isfinite(value) or value <= 0:
            missing[name] = f"was {value:g}"
        else:
            values[name] = value

    for name, quantity in QUANTITIES.items():
        which = layers if name == "max_logit" else quantity.layers
        tag = quantity.tag + {"first": "/layer_00", "largest": "/layer_", "one": ""}[which]
        series = [each for key, each in own.items() if key.startswith(tag) and (which == "largest" or key == tag)]
        if quantity.when == "early":
            found = _early(row, series, wanted)
        else:
            found = "the run diverged" if diverged else _late(row, series)
        take(name, found)
    take("loss", "the run diverged" if diverged else row["score"] if row["score"] is not None else "no loss")
    rate, seed = float(row[RATE]), int(row.get(SEED) or 0)
    return Run(float(row["parameters"]), rate, seed, diverged, values, missing, row)


def _warm(row: Row) -> int:
    """The end of warm-up, in steps."""
    steps = int(row.get("schedule.warmup_steps") or 0)
    if row.get("schedule.warmup_tokens") is not None:
        steps = -(-row["schedule.warmup_tokens"] // (row["batch.global_size"] * row["model.sequence_length"]))
    return steps or max(1, round(EARLY * (row.get("run.steps") or row.get("steps") or 1)))


def _early(row: Row, series: Sequence[Series], wanted: int) -> float | str:
    """The largest of the series at the measured step that is nearest to the one that is wanted."""
    found = []
    for steps, values in series:
        nearest = int(np.argmin(np.abs(steps - wanted)))
        if abs(steps[nearest] - wanted) > max(NEAR * wanted, 1):
            return f"not measured about step {wanted}"
        began = row.get("diverged_at")
        if row["status"] == "diverged" and (began is None or began <= steps[nearest]):
            return f"the run diverged before step {steps[nearest]:.0f}"
        found.append(float(values[nearest]))
    return float(np.max(found)) if found else "not measured"


def _late(row: Row, series: Sequence[Series]) -> float | str:
    """The largest of the series' magnitudes, each its mean over the last tenth of the steps."""
    means = []
    for steps, values in series:
        last = values[steps > (1 - END) * (row.get("steps") or steps[-1])]
        means.append(abs(float(last.mean())) if len(last) else math.nan)
    return float(np.max(means)) if means else "not measured"
