"""Figures: all of a report of runs, and any as files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_stable.analysis.drawing import png, svg
from megatron_stable.analysis.report.inside import draw_probes, probe_charts
from megatron_stable.analysis.report.run import Run
from megatron_stable.analysis.report.scalars import draw_scalars, scalar_charts
from megatron_stable.files import write_file


class Drawn(NamedTuple):
    """A figure.

    Attributes:
        name: Of its files.
        caption: What it is, and how to read it.
        picture: A matplotlib figure.
        group: Of its probes; ``None``: it is of something else.
    """

    name: str
    title: str
    caption: str
    picture: Any
    group: str | None = None


def figures(runs: Sequence[Run]) -> Iterator[Drawn]:
    """Draw all of a report, one after another."""
    for chart in scalar_charts(runs):
        yield Drawn(chart.name, chart.title, chart.caption, draw_scalars(chart, runs))
    for inside in probe_charts(runs):
        yield Drawn(inside.name, inside.title, inside.caption, draw_probes(inside, runs), inside.group)


def write_figures(figures: Iterable[Drawn], directory: Path) -> list[Path]:
    """Write each as NAME.svg and NAME.png. DataError: one cannot be written."""
    written = []
    for drawn in figures:
        for kind, data in (("svg", svg(drawn.picture).encode()), ("png", png(drawn.picture))):
            written.append(directory / f"{drawn.name}.{kind}")
            write_file(written[-1], data)
    return written
