"""All figures of a report: for the page, and as files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_stable.analysis.drawing import png, svg
from megatron_stable.analysis.report.inside import ProbeChart, draw_probes, probe_charts
from megatron_stable.analysis.report.run import Run
from megatron_stable.analysis.report.scalars import Chart, draw_scalars, scalar_charts
from megatron_stable.files import write_file


class Drawn(NamedTuple):
    """A figure: what it is of, and its picture."""

    chart: Chart | ProbeChart
    picture: Any

    @property
    def group(self) -> str | None:
        """Of its probes; ``None``: it is of what each step records."""
        return self.chart.group if isinstance(self.chart, ProbeChart) else None


def figures(runs: Sequence[Run]) -> Iterator[Drawn]:
    """Draw them, one after another."""
    for chart in scalar_charts(runs):
        yield Drawn(chart, draw_scalars(chart, runs))
    for inside in probe_charts(runs):
        yield Drawn(inside, draw_probes(inside, runs))


def write_figures(runs: Sequence[Run], directory: Path) -> list[Path]:
    """Write each as NAME.svg and NAME.png. DataError: one cannot be written."""
    written = []
    for drawn in figures(runs):
        for kind, data in (("svg", svg(drawn.picture).encode()), ("png", png(drawn.picture))):
            written.append(directory / f"{drawn.chart.name}.{kind}")
            write_file(written[-1], data)
    return written
