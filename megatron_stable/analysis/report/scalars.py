"""The charts of what each step records: loss, gradient norm, learning rate, speed. Several runs share the axes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_stable.analysis.drawing import INK, MUTED, canvas, log_ticks, plain, style, tidy
from megatron_stable.analysis.report.marks import draw_marks_of
from megatron_stable.analysis.report.reading import where
from megatron_stable.analysis.report.run import Run
from megatron_stable.analysis.report.thinning import Line
from megatron_stable.records.metrics import EPOCHS

WIDTH, LEFT, RIGHT, TOP, BOTTOM, GAP = 10.0, 0.75, 0.2, 0.4, 0.5, 0.32  # inches
SMALL = 8.5  # points of text
RATIO = 30.0  # a positive series whose values span so much is drawn on a logarithmic axis
MOST_OTHER = 24  # numbers that nobody foresaw, of a run of another version perhaps
OFF = {"loss_scale": 1.0}  # what a series is throughout if there is no such thing; others are 0
FEW = 64  # points that are drawn as such


class Panel(NamedTuple):
    """Series on one pair of axes: their keys, what the axis says, its height in inches, whether it is logarithmic."""

    keys: tuple[str, ...]
    label: str
    height: float = 1.3
    log: bool = False


class Chart(NamedTuple):
    """A figure of the report.

    Attributes:
        name: Of its file, and of what refers to it.
        caption: How to read it.
    """

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]


CHARTS = (
    Chart(
        "loss",
        "Loss",
        "Cross-entropy of training, and of validation where it was measured. It should fall and flatten. A peak that "
        "falls back is a spike; a level that stays up is a change of the data, or damage to the model.",
        (Panel(("loss", "validation_loss"), "nats per token", 3.0), Panel(("z_loss", "mu_loss"), "other terms", 1.0)),
    ),
    Chart(
        "gradient",
        "Gradient norm and learning rate",
        "Norm of the whole gradient before clipping, and the learning rate of the step. A norm that rises while the "
        "learning rate does not, or peaks that come more often, often precede a spike of the loss.",
        (Panel(("grad_norm",), "gradient norm", 1.8, True), Panel(("learning_rate",), "learning rate", 1.1)),
    ),
    Chart(
        "guard",
        "What the guard sees",
        "How far loss and gradient norm are above their recent median, in median absolute deviations, and the updates "
        "that were not made. What stays near 0 is usual.",
        (
            Panel(("loss_score", "grad_norm_score"), "deviations"),
            Panel(("skipped",), "dropped updates", 0.8),
            Panel(("loss_scale",), "loss scale", 0.9, True),
        ),
    ),
    Chart(
        "throughput",
        "Throughput",
        "Tokens per second of all ranks, and the part of the hardware's arithmetic that the model used. A level that "
        "drops and stays points at a machine or its network, single dips at checkpoints and evaluations.",
        (Panel(("tokens_per_second",), "tokens / s", 1.5), Panel(("mfu",), "MFU", 1.0)),
    ),
    Chart(
        "data",
        "Position in the data",
        "The data step that each step trained on, the tokens so far, and how often each source has been read. The "
        "first rises by one a step; where data were skipped, it jumps.",
        (Panel(("data_step",), "data step", 1.1), Panel(("tokens",), "tokens", 1.0)),
    ),
)
ELSEWHERE = {"validation_perplexity"}  # the exponential of a series that is drawn


def scalar_charts(runs: Sequence[Run]) -> Iterator[Chart]:
    """The charts of which any run has a series; numbers that nobody foresaw come last."""
    keys = dict.fromkeys(key for run in runs for key in run.curves.series.keys)
    epochs = tuple(key for key in keys if key.startswith(EPOCHS))
    known = ELSEWHERE.union(epochs, *(panel.keys for chart in CHARTS for panel in chart.panels))
    other = [key for key in keys if key not in known and where(key) is None][:MOST_OTHER]
    more = Chart("other", "Other numbers", "What else is recorded.", tuple(Panel((key,), key, 1.0) for key in other))
    for chart in (*CHARTS, more):
        sources = (Panel(epochs, "epochs", 1.3),) if chart.name == "data" else ()
        drawn = (*chart.panels, *sources)
        panels = tuple(panel for panel in drawn if any(_has_values(runs, key) for key in panel.keys))
        if panels:
            yield chart._replace(panels=panels)


def _has_values(runs: Sequence[Run], key: str) -> bool:
    """Whether a series is there and more than the constant that says it is off."""
    lines, off = [run.curves.series.line(key) for run in runs], OFF.get(key, 0.0)
    return any(line.lost.any() or (line.least != off).any() or (line.most != off).any() for line in lines)


def draw_scalars(chart: Chart, runs: Sequence[Run]) -> Any:
    """The figure of a chart."""
    heights = [panel.height for panel in chart.panels]
    height = TOP + sum(heights) + GAP * (len(heights) - 1) + BOTTOM
    figure, top = canvas(WIDTH, height), height - TOP
    for panel in chart.panels:
        top -= panel.height
        axes = figure.add_axes((LEFT / WIDTH, top / height, (WIDTH - LEFT - RIGHT) / WIDTH, panel.height / height))
        top -= GAP
        _draw_panel(axes, panel, runs)
        if panel is chart.panels[-1]:
            axes.set_xlabel("step", fontsize=SMALL)
        else:
            axes.tick_params(labelbottom=False)
    return figure


def _draw_panel(axes: Any, panel: Panel, runs: Sequence[Run]) -> None:
    logarithmic, several, lines = panel.log, len(runs) > 1, 0
    for number, run in enumerate(runs):
        for which, key in enumerate(panel.keys):
            line = run.curves.series.line(key)
            if not len(line.steps):
                continue
            past = run.curves.superseded.line(key)
            if len(past.steps):
                draw_line(axes, past, {"color": MUTED, "linestyle": "-"}, "", 0.7)
            name = plain(": ".join([run.name] * several + [key.replace("_", " ")] * (len(panel.keys) > 1)))
            draw_line(axes, line, style(number if several else which) | _second(several, which), name)
            logarithmic = logarithmic or _spans_much(line)
            lines += 1
    finish(axes, panel.label, logarithmic)
    draw_marks_of(axes, runs)
    set_steps(axes, runs)
    if lines > 1:
        axes.legend(frameon=False, fontsize=SMALL, loc="upper right", labelcolor=INK, ncols=2 if lines > 4 else 1)


def _second(several: bool, which: int) -> dict[str, Any]:
    """Of several runs, the second series of a panel has its run's colour, and dots."""
    return {"linestyle": ":"} if several and which else {}


def _spans_much(line: Line) -> bool:
    positive = line.least[line.least > 0]
    return positive.size == np.isfinite(line.least).sum() > 0 and np.nanmax(line.most) > RATIO * positive.min()


def draw_line(axes: Any, line: Line, look: dict[str, Any], label: str, width: float = 1.2) -> None:
    """A series: its mean, in a band from least to greatest; crosses at the upper edge where it was not finite."""
    known = np.isfinite(line.mean)
    steps = line.steps[known]
    if (line.most > line.least).any():
        axes.fill_between(steps, line.least[known], line.most[known], color=look["color"], alpha=0.25, linewidth=0)
    points = {"marker": "o", "markersize": 2.5} if len(steps) <= FEW else {}
    axes.plot(steps, line.mean[known], label=label or "_", linewidth=width, **points, **look)
    lost = line.steps[line.lost]
    if len(lost):
        axes.plot(
            lost, [0.97] * len(lost), "x", transform=axes.get_xaxis_transform(), color=look["color"], markersize=4,
            scalex=False, scaley=False,
        )  # fmt: skip


def finish(axes: Any, label: str, logarithmic: bool) -> None:
    """Grid, scale and label of a chart whose series are drawn."""
    tidy(axes)
    low, high = axes.get_ylim()
    if logarithmic and axes.dataLim.minposy < np.inf:
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.set_yticks(*log_ticks(*axes.get_ylim()))
    elif high - low < 1e-9 * max(abs(high), abs(low)):  # a constant
        axes.set_ylim(low - abs(low) / 10 - 1e-12, high + abs(high) / 10 + 1e-12)
    axes.set_ylabel(plain(label), fontsize=SMALL)
    axes.tick_params(labelsize=SMALL, which="both")


def set_steps(axes: Any, runs: Sequence[Run]) -> None:
    """The axis of steps, the same in all charts."""
    axes.set_xlim(0.5, max(max(run.curves.step, run.curves.superseded.last) for run in runs) + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
