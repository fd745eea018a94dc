"""Output norms over time: a run of a sweep that diverged, beside one that did not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import log
from pathlib import Path

import numpy as np

from megatron_stable.analysis.report.figures import Drawn
from megatron_stable.errors import DataError
from megatron_stable.files import explain_os_errors
from megatron_stable.numbers import finite
from megatron_stable.stability.probes import LINEARS
from megatron_stable.study.criteria import best_of, diverged
from megatron_stable.study.panels import Line, Panel, Point, draw, short
from megatron_stable.study.sensitivity import Group
from megatron_stable.study.table import RATE, SEED, Row

OUTPUT = "output_norm"
MEASURED = f"{OUTPUT}/{LINEARS[0]}"  # a column that runs have if their outputs were measured
NAMES = dict(zip(LINEARS, ("QKV", "Proj", "FC1", "FC2"), strict=True))
ALIKE = 1.1  # models of one size differ by less than so many times in their parameters: a norm has some, too
PAIR = (
    "Two runs as alike as the sweep has them, one of which diverged: in arXiv 2410.16682 (§3) the outputs of QKV, Proj "
    "and FC2 then grow to more than twice those of the stable run."
)
POINTS = 400  # of a line, at most


def outputs(groups: Sequence[Group], probes: Path) -> Iterator[Drawn]:
    """The figure, where two such runs were measured, or one.

    Args:
        probes: What was measured over time; there need not be such a file.
    """
    runs = contrast(groups) if probes.is_file() else []
    series = [over_time(probes, row["name"]) for _, row in runs]
    labels = [
        f"{group.name}: {short(row[RATE])}, {'diverged' if _diverged(group, row) else 'stable'}" for group, row in runs
    ]
    panels = [
        Panel(NAMES[point], [Line(label, found[point]) for label, found in zip(labels, series, strict=True)])
        for point in LINEARS
        if any(found[point] for found in series)
    ]
    if panels:
        names = ", ".join(row["name"] for _, row in runs)
        text = PAIR if len(runs) > 1 else "No run that diverged can be laid beside it."
        yield Drawn(
            "output_norms", "Output norms over time",
            f"Largest over layers of the L2 norm of a token's output. {text} Runs: {names}.",
            draw(panels, "step", "output norm", "run", log=(False, True)),
        )  # fmt: skip


def contrast(groups: Sequence[Group]) -> list[tuple[Group, Row]]:
    """A run that diverged and one that did not, of one seed and unlike in one axis, of those whose outputs are known.

    Best at the same learning rate and of the same size, the largest there is. Without a pair: the last run, or none.
    """
    runs = [(group, row) for group in groups for row in group.rows if finite(row.get(MEASURED)) is not None]
    ended = {verdict: [run for run in runs if _diverged(*run) is verdict] for verdict in (True, False)}
    pairs = [(lost, kept) for lost in ended[True] for kept in ended[False] if _unlike(lost, kept) == 1]
    return [*min(pairs, key=_remoteness)] if pairs else runs[-1:]


def _diverged(group: Group, row: Row) -> bool | None:
    return diverged(row, best_of(group.rows))


def _unlike(one: tuple[Group, Row], other: tuple[Group, Row]) -> int:
    """On how many axes two runs differ."""
    (group, row), (second, partner) = one, other
    axes = [row.get(key) != partner.get(key) for key in (RATE, SEED)]
    return sum(axes) + sum(group.values[axis] != second.values[axis] for axis in group.values) + axes[1]


def _remoteness(pair: tuple[tuple[Group, Row], tuple[Group, Row]]) -> tuple[float, ...]:
    """What a pair is chosen by, the least first."""
    (group, row), (other, partner) = pair
    sizes = [each.parameters or 1 for each in (group, other)]
    return abs(log(row[RATE] / partner[RATE])), max(sizes) > ALIKE * min(sizes), -min(sizes), row[RATE]


def over_time(probes: Path, name: str) -> dict[str, list[Point]]:
    """Output norms of a run, by where they were measured: largest over layers, and of each stretch of steps.

    Raises:
        DataError: The file cannot be read.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    run, tag = (pc.field(column).cast(pa.string()) for column in ("run", "tag"))
    chosen = (run == name) & pc.starts_with(tag, f"{OUTPUT}/")
    with explain_os_errors("read", probes):
        try:
            table = pq.read_table(probes, columns=["step", "tag", "value"], filters=chosen)
        except pa.ArrowException as error:
            raise DataError(f"cannot read {probes}: {error}") from error
    points = np.array([text.split("/")[1] for text in table["tag"].to_pylist()], str)
    steps, values = (table[column].to_numpy().astype(float) for column in ("step", "value"))
    return {point: _largest(steps[points == point], values[points == point]) for point in LINEARS}


def _largest(steps: np.ndarray, values: np.ndarray) -> list[Point]:
    known = np.isfinite(values) & (values > 0)
    steps, values = steps[known], values[known]
    if not len(steps):
        return []
    width = max(1.0, np.ceil(len(np.unique(steps)) / POINTS))
    places, which = np.unique(steps, return_inverse=True)
    stretches = (which // width).astype(int)
    most = np.full(stretches.max() + 1, -np.inf)
    np.maximum.at(most, stretches, values)
    return [Point(float(x), float(y), float(y), float(y)) for x, y in zip(places[:: int(width)], most, strict=True)]
