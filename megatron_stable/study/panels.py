"""How the figures of a sweep look: panels side by side that share their axes, lines with points, one legend for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import floor, log10
from textwrap import fill
from typing import Any, NamedTuple

from megatron_stable.analysis.drawing import INK, MUTED, PAPER, canvas, log_ticks, plain, style, tidy

WIDTH, LEFT, LEGEND, TOP, BOTTOM = 10.0, 0.85, 1.9, 0.35, 0.5  # inches
ACROSS, DOWN, HEIGHTS = 0.25, 0.5, {1: 3.6, 2: 2.8, 3: 2.3}  # between panels; of a panel, by how many are in a row
SMALL = 8.5  # points of text
MARKERS = "os^Dv<>ph*"
FULL, HOLLOW, BARE = "full", "hollow", "bare"
FEW = 32  # points that are drawn as such
CROSS, APART = 5.5, 6.5  # points of a cross, and between two that would be in one place
NARROW = 1.5  # where the greatest is so many times the least, an axis need not be logarithmic
LETTERS = 25  # of a line of the legend


class Point(NamedTuple):
    """Of a line: its place, the least and the greatest of what it is the mean of, and how it is marked."""

    x: float
    y: float
    low: float
    high: float
    mark: str = FULL


class Line(NamedTuple):
    """A line, and the places of crosses in its colour; a point at such a place should have no mark of its own."""

    label: str
    points: Sequence[Point]
    crosses: Sequence[tuple[float, float]] = ()


class Panel(NamedTuple):
    """Axes with lines.

    Attributes:
        level: Where a dotted line goes across, and what it says.
    """

    title: str
    lines: Sequence[Line]
    level: tuple[float, str] | None = None


def draw(panels: Sequence[Panel], x: str, y: str, legend: str = "", log: tuple[bool, bool] = (True, True)) -> Any:
    """A matplotlib figure.

    Args:
        x, y: What the axes are of.
        legend: What the lines are.
        log: Whether each axis is logarithmic, if its range is not narrow.
    """
    columns = len(panels) if len(panels) <= 3 else 2 if len(panels) == 4 else 3
    rows, height = -(-len(panels) // columns), HEIGHTS[columns]
    numbers = {label: i for i, label in enumerate(dict.fromkeys(line.label for each in panels for line in each.lines))}
    beside = LEGEND if len(numbers) > 1 else 0.2
    width = (WIDTH - LEFT - beside - ACROSS * (columns - 1)) / columns
    total = TOP + rows * height + (rows - 1) * DOWN + BOTTOM
    figure, first = canvas(WIDTH, total), None
    for i, panel in enumerate(panels):
        row, column = divmod(i, columns)
        left, bottom = LEFT + column * (width + ACROSS), total - TOP - height - row * (height + DOWN)
        box = (left / WIDTH, bottom / total, width / WIDTH, height / total)
        axes = figure.add_axes(box, sharex=first, sharey=first)
        first = first or axes
        crosses = Counter(place for line in panel.lines for place in line.crosses)
        drawn = Counter[tuple[float, float]]()
        for line in panel.lines:
            _draw_line(axes, line, numbers[line.label])
            for place in line.crosses:
                shift = (drawn[place] - (crosses[place] - 1) / 2) * APART
                _draw_cross(axes, place, shift, style(numbers[line.label])["color"])
                drawn[place] += 1
        if panel.level is not None:
            axes.axhline(panel.level[0], color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
            axes.annotate(
                plain(panel.level[1]), (0, panel.level[0]), xycoords=("axes fraction", "data"), xytext=(3, 3),
                textcoords="offset points", fontsize=SMALL - 1, color=INK,
            )  # fmt: skip
        axes.set_title(plain(panel.title), fontsize=SMALL + 0.5, loc="left", color=INK)
        axes.tick_params(labelleft=column == 0, labelbottom=i + columns >= len(panels))
        if i + columns >= len(panels):
            axes.set_xlabel(plain(x), fontsize=SMALL)
        if column == 0:
            axes.set_ylabel(plain(y), fontsize=SMALL)
    for axes in figure.axes:
        _scale(axes, log)
    if len(numbers) > 1:
        _legend(figure, [*numbers], legend, (WIDTH - LEGEND + 0.1) / WIDTH, 1 - (TOP - 0.1) / total)
    return figure


def _draw_line(axes: Any, line: Line, number: int) -> None:
    look = style(number)
    axes.plot([p.x for p in line.points], [p.y for p in line.points], linewidth=1.3, **look)
    spread = [p for p in line.points if p.high > p.low]
    axes.vlines(
        [p.x for p in spread], [p.low for p in spread], [p.high for p in spread], color=look["color"], linewidth=0.9
    )
    for mark, inside in ((FULL, look["color"]), (HOLLOW, PAPER)) if len(line.points) <= FEW else ():
        some = [p for p in line.points if p.mark == mark]
        axes.plot(
            [p.x for p in some], [p.y for p in some], MARKERS[number % len(MARKERS)], color=look["color"],
            markersize=4.2, markerfacecolor=inside, markeredgewidth=1,
        )  # fmt: skip


def _draw_cross(axes: Any, place: tuple[float, float], shift: float, color: str) -> None:
    from matplotlib.transforms import ScaledTranslation

    beside = axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
    axes.plot(*place, "x", color=color, markersize=CROSS, markeredgewidth=1.5, transform=beside, zorder=4)


def _scale(axes: Any, log: tuple[bool, bool]) -> None:
    from matplotlib.ticker import NullLocator

    tidy(axes)
    axes.margins(x=0.06)
    for axis, which in zip((axes.xaxis, axes.yaxis), log, strict=True):
        low, high = axis.get_data_interval()
        if which and high > NARROW * low > 0:
            axis._set_axes_scale("log")
            ticks, _ = log_ticks(*axis.get_view_interval())
            axis.set_ticks(ticks, [short(tick) for tick in ticks])
            axis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=SMALL)


def short(value: float) -> str:
    """A number of any size as an axis has it: 3e-4, 0.03, 300, 20k, 1.5M."""
    if value >= 1e4:
        power = min(int(log10(value)) // 3, 4)
        return f"{value / 1000**power:g}{' kMBT'[power]}"
    if value >= 1e-3:
        return f"{value:g}"
    power = floor(log10(value) + 1e-9)
    return f"{value / 10.0**power:.3g}e{power}"


def _legend(figure: Any, names: Sequence[str], title: str, x: float, y: float) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker=MARKERS[i % len(MARKERS)], markersize=4.2, linewidth=1.3, **style(i))
        for i in range(len(names))
    ]
    figure.legend(
        handles, [fill(plain(name), LETTERS) for name in names], title=plain(title), frameon=False, fontsize=SMALL,
        title_fontsize=SMALL, labelcolor=INK, loc="upper left", bbox_to_anchor=(x, y), borderaxespad=0,
        alignment="left", handlelength=2.8,
    )  # fmt: skip
