"""The charts of what is measured inside the model, as the table of probes says: lines over steps, and maps of layers.

What a probe is called, where it is measured and on what scale it is drawn all come from ``stability/probes.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_stable.analysis.drawing import HOLE, INK, MAP, MUTED, canvas, log_ticks, plain, style
from megatron_stable.analysis.report.marks import draw_marks, draw_marks_of
from megatron_stable.analysis.report.reading import where
from megatron_stable.analysis.report.run import Run
from megatron_stable.analysis.report.scalars import SMALL, draw_line, finish, set_steps
from megatron_stable.analysis.report.thinning import Line, Numbers, standing_out
from megatron_stable.stability.probes import PROBES, Probe

ROW, GAP, TOP, BOTTOM = 1.3, 0.42, 0.38, 0.45  # inches, of rows of axes
LEFT, LINES, BETWEEN, MAPS, BESIDE, BAR = 0.75, 3.7, 0.55, 4.1, 0.1, 0.1
NARROWEST = 1.9  # of a map, where several runs share the width
SHADES = 64
LOST = np.array([0, 0, 0, 255], np.uint8)

ALL = (
    "Lines: the median over layers, in a band from smallest to largest. Maps: each layer's value, layer 0 below; "
    "black where it was not finite. A cell is the mean of its steps, or the value among them that stands out."
)
ONE = "A line for each of these numbers."


class Places(NamedTuple):
    """Where a run has a probe: keys by layer of each point, and the key of each that has no layers."""

    layers: dict[str, dict[int, str]]
    outside: dict[str, str]


class ProbeChart(NamedTuple):
    """A figure of the report: one probe of all layers, or the probes of a group that have no layers.

    Attributes:
        name: Of its file, and of what refers to it.
        caption: What it is, and how to read it.
    """

    name: str
    title: str
    caption: str
    group: str
    probes: tuple[Probe, ...]


def probe_charts(runs: Sequence[Run]) -> Iterator[ProbeChart]:
    """The charts of the probes that any run has, in the order of their table."""
    there = {found.probe.name for run in runs for key in run.curves.series.keys if (found := where(key)) is not None}
    single: dict[str, list[Probe]] = {}
    for probe in PROBES.values():
        if not probe.layered and probe.name in there:
            single.setdefault(probe.group, []).append(probe)
    for probe in PROBES.values():
        if probe.name not in there:
            continue
        if probe.layered:
            meaning = f"{probe.meaning[0].upper()}{probe.meaning[1:]}. {ALL} Source: {probe.source}."
            yield ProbeChart(probe.name.replace("/", "_"), title(probe), meaning, probe.group, (probe,))
        elif probes := single.pop(probe.group, []):
            meaning = "; ".join(f"{title(each).partition(': ')[2] or title(each)}: {each.meaning}" for each in probes)
            sources = "; ".join(dict.fromkeys(each.source for each in probes))
            caption = f"{meaning[0].upper()}{meaning[1:]}. {ONE} Source: {sources}."
            name = probe.group if len(probes) > 1 else probe.name.replace("/", "_")
            yield ProbeChart(name, name.replace("_", " ").capitalize(), caption, probe.group, tuple(probes))


def title(probe: Probe) -> str:
    """Its name, in words."""
    return probe.name.replace("/", ": ").replace("_", " ").capitalize()


def draw_probes(chart: ProbeChart, runs: Sequence[Run]) -> Any:
    """The figure of a chart."""
    return _draw_layers(chart.probes[0], runs) if chart.probes[0].layered else _draw_numbers(chart.probes, runs)


def places_of(run: Run, probe: Probe) -> Places:
    """Where a run has a probe."""
    layers: dict[str, dict[int, str]] = {}
    outside: dict[str, str] = {}
    for key in run.curves.series.keys:
        found = where(key)
        if found is None or found.probe is not probe:
            continue
        if found.layer is None:
            outside[found.point or ""] = key
        else:
            layers.setdefault(found.point or "", {})[found.layer] = key
    order = [*probe.points, *probe.outside, ""]
    ordered = {point: dict(sorted(layers[point].items())) for point in sorted(layers, key=order.index)}
    return Places(ordered, {point: outside[point] for point in sorted(outside, key=order.index)})


def _draw_numbers(probes: Sequence[Probe], runs: Sequence[Run]) -> Any:
    """Probes of one number each, in two columns; runs share the axes."""
    rows, wide = (len(probes) + 1) // 2, len(probes) == 1
    height, width = TOP + rows * ROW + (rows - 1) * GAP + BOTTOM, LEFT + LINES + BETWEEN + LEFT + LINES
    figure = canvas(width, height)
    for number, probe in enumerate(probes):
        row, column = divmod(number, 2)
        across = width - LEFT - BETWEEN if wide else LINES
        box = (LEFT + column * (LINES + BETWEEN + LEFT / 2), height - TOP - row * (ROW + GAP) - ROW, across, ROW)
        axes = figure.add_axes(_share(box, width, height))
        for which, run in enumerate(runs):
            draw_line(axes, run.curves.series.line(probe.name), style(which), plain(run.name))
        _finish(axes, runs, _label(title(probe), probe), probe.log, last=number + 2 >= len(probes))
        if number == 0 and len(runs) > 1:
            axes.legend(frameon=False, fontsize=SMALL, labelcolor=INK)
    return figure


def _draw_layers(probe: Probe, runs: Sequence[Run]) -> Any:
    """A row for each point: lines of all runs on the left, and a map of layers for each on the right."""
    found = [places_of(run, probe) for run in runs]
    points = list(dict.fromkeys(point for places in found for point in places.layers))
    outside = list(dict.fromkeys(point for places in found for point in places.outside))
    rows = len(points) + bool(outside)
    each = max(NARROWEST, (MAPS - BESIDE * (len(runs) - 1)) / len(runs))
    left = LEFT + LINES + BETWEEN
    width = left + len(runs) * (each + BESIDE) + BAR + 0.6
    height = TOP + rows * ROW + (rows - 1) * GAP + BOTTOM
    figure = canvas(width, height)
    for row, point in enumerate(points):
        bottom = height - TOP - row * (ROW + GAP) - ROW
        tables = [_cells(run, probe, places.layers.get(point, {})) for run, places in zip(runs, found, strict=True)]
        axes = figure.add_axes(_share((LEFT, bottom, LINES, ROW), width, height))
        for which, (run, cells) in enumerate(zip(runs, tables, strict=True)):
            if cells is not None:
                draw_line(axes, cells.over_layers(run), style(which), plain(run.name))
        _finish(axes, runs, _label(point or title(probe), probe), probe.log, last=row == rows - 1)
        if row == 0 and len(runs) > 1:
            axes.legend(frameon=False, fontsize=SMALL, labelcolor=INK)
        scale = _scale([cells for cells in tables if cells is not None], probe.log)
        for which, (run, cells) in enumerate(zip(runs, tables, strict=True)):
            box = (left + which * (each + BESIDE), bottom, each, ROW)
            below = row == len(points) - 1
            _draw_map(figure.add_axes(_share(box, width, height)), run, cells, scale, runs, below, which == 0)
            if len(runs) > 1 and row == 0:
                name = plain(run.name)
                figure.axes[-1].text(0.5, 1.07, name, transform=figure.axes[-1].transAxes, ha="center", fontsize=SMALL)
        bar = _share((left + len(runs) * (each + BESIDE), bottom, BAR, ROW), width, height)
        _draw_bar(figure.add_axes(bar), scale, point)
    if outside:
        axes = figure.add_axes(_share((LEFT, BOTTOM, LINES, ROW), width, height))
        for which, (run, places) in enumerate(zip(runs, found, strict=True)):
            for number, (point, key) in enumerate(places.outside.items()):
                name = plain(f"{run.name}: {point}" if len(runs) > 1 else point)
                look = style(which if len(runs) > 1 else number) | {"linestyle": style(6 * number)["linestyle"]}
                draw_line(axes, run.curves.series.line(key), look, name)
        _finish(axes, runs, _label(", ".join(outside), probe), probe.log, last=True)
        axes.legend(frameon=False, fontsize=SMALL, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    return figure


class Cells(NamedTuple):
    """The values of a point, ``[layers, stretches]``: least, mean, greatest, whether any was lost, and what to show."""

    layers: list[int]
    least: Numbers
    mean: Numbers
    most: Numbers
    lost: np.ndarray
    shown: Numbers

    def over_layers(self, run: Run) -> Line:
        """Smallest, median and largest over the layers."""
        there = np.flatnonzero(np.isfinite(self.mean).any(0) | self.lost.any(0))
        with np.errstate(invalid="ignore"):
            least, middle, most = (
                np.array([_of(part[:, i], take) for i in there])
                for part, take in ((self.least, np.min), (self.mean, np.median), (self.most, np.max))
            )
        width = run.curves.series.width
        return Line(there * float(width) + (width + 1) / 2, least, middle, most, np.asarray(self.lost[:, there].any(0)))


def _of(values: Numbers, take: Any) -> float:
    known = values[np.isfinite(values)]
    return float(take(known)) if known.size else float("nan")


def _cells(run: Run, probe: Probe, keys: dict[int, str]) -> Cells | None:
    if not keys:
        return None
    least, mean, most, lost = run.curves.series.table(list(keys.values()))
    return Cells(list(keys), least, mean, most, lost, standing_out(least, mean, most, probe.log))


def _scale(tables: Sequence[Cells], logarithmic: bool) -> Any:
    """The colours of values: of all runs the same."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize

    values = np.concatenate([cells.shown[np.isfinite(cells.shown)] for cells in tables] or [np.empty(0)])
    values = values[values > 0] if logarithmic else values
    low, high = (float(values.min()), float(values.max())) if values.size else (1.0, 1.0)
    if high <= low * (1 + 1e-6) if low > 0 else high <= low:
        low, high = low - 0.05 * abs(low) - 1e-12, high + 0.05 * abs(high) + 1e-12
    norm = LogNorm if logarithmic and low > 0 else Normalize
    return ScalarMappable(norm(low, high), colormaps[MAP].resampled(SHADES))


def _draw_map(
    axes: Any, run: Run, cells: Cells | None, scale: Any, runs: Sequence[Run], below: bool, first: bool
) -> None:
    """Layers over steps; where nothing was measured the ground shows."""
    axes.set_facecolor(HOLE)
    axes.spines[:].set_color(MUTED)
    axes.tick_params(color=MUTED, labelcolor=INK, labelsize=SMALL, labelbottom=below, labelleft=first)
    if cells is not None:
        width = run.curves.series.width
        used = -(-run.curves.series.last // width)
        shown = _held(cells, max(1, run.config.logging.probes_every // width), used)
        picture = scale.to_rgba(np.ma.masked_invalid(cells.shown), bytes=True)[:, shown]
        missing = (~np.isfinite(cells.mean) & ~cells.lost)[:, shown]
        if _is_log(scale):
            missing |= (cells.shown <= 0)[:, shown]
        picture[missing] = 0
        picture[cells.lost[:, shown]] = LOST
        picture[:, shown < 0] = 0
        extent = (0.5, used * width + 0.5, -0.5, len(cells.layers) - 0.5)
        axes.imshow(picture, aspect="auto", origin="lower", interpolation="none", extent=extent)
        ticks = np.unique(np.linspace(0, len(cells.layers) - 1, min(5, len(cells.layers))).astype(int))
        axes.set_yticks(ticks, [str(cells.layers[tick]) for tick in ticks])
    set_steps(axes, runs)
    draw_marks(axes, run, lines=False)
    if first:
        axes.set_ylabel("layer", fontsize=SMALL)
    if below:
        axes.set_xlabel("step", fontsize=SMALL)


def _held(cells: Cells, spacing: int, used: int) -> np.ndarray:
    """Which stretch each column shows: a measurement is held until the next is due; -1: none."""
    there = (np.isfinite(cells.mean) | cells.lost).any(0)[:used]
    newest = np.maximum.accumulate(np.where(there, np.arange(used), -1))
    return np.where(np.arange(used) - newest < spacing, newest, -1)


def _draw_bar(axes: Any, scale: Any, label: str) -> None:
    """The colours of values; matplotlib's own takes ten times as long."""
    colors = scale.cmap(np.linspace(0, 1, SHADES), bytes=True)[:, None]
    axes.imshow(colors, aspect="auto", origin="lower", interpolation="none", extent=(0, 1, 0, 1))
    low, high = scale.norm.vmin, scale.norm.vmax
    if _is_log(scale):
        ticks, labels = log_ticks(low, high)
    else:
        ticks = np.linspace(low, high, 4).tolist()
        labels = [f"{tick:.2g}" for tick in ticks]
    axes.set_yticks([float(scale.norm(tick)) for tick in ticks], labels)
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.spines[:].set_color(MUTED)
    axes.tick_params(labelsize=SMALL - 1, color=MUTED, labelcolor=INK)
    axes.text(0.5, 1.05, plain(label), transform=axes.transAxes, ha="center", fontsize=SMALL - 1, color=INK)


def _is_log(scale: Any) -> bool:
    return scale.norm.__class__.__name__ == "LogNorm"


def _finish(axes: Any, runs: Sequence[Run], label: str, logarithmic: bool, last: bool) -> None:
    finish(axes, label, logarithmic)
    draw_marks_of(axes, runs)
    set_steps(axes, runs)
    axes.tick_params(labelbottom=last)
    if last:
        axes.set_xlabel("step", fontsize=SMALL)


def _label(name: str, probe: Probe) -> str:
    return name if probe.unit == "1" else f"{name} ({probe.unit})"


def _share(box: tuple[float, float, float, float], width: float, height: float) -> tuple[float, float, float, float]:
    """Inches as parts of the figure."""
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height
