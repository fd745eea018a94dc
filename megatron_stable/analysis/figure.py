"""The curves of runs as a picture: training and validation loss, and the gradient norm, over steps, with events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import isfinite
from pathlib import Path
from typing import NamedTuple

from megatron_stable.analysis.drawing import COLORS, DPI, GRID, canvas, png
from megatron_stable.errors import DataError
from megatron_stable.files import write_file
from megatron_stable.records.metrics import Record

VALIDATION, GREY = "#111111", "#666666"
EVENT_COLORS = ["#d62728", "#8c564b", "#e0a800", "#17a2b8"]  # one per label
SMOOTH = 50  # the smoothed training loss averages over this fraction of the run to each side


class Event(NamedTuple):
    """A stretch of steps, inclusive, to be marked with what happened there."""

    first: int
    last: int
    label: str


def draw(
    runs: Mapping[str, Sequence[Record]],
    output: Path,
    title: str = "",
    events: Sequence[Event] = (),
    labels: tuple[str, str] = ("cross-entropy (nats per token)", "gradient norm"),
) -> None:
    """Write a PNG with the curves of one or more runs.

    Args:
        runs: Records in order of steps, by what the legend shall call them.
        output: The file to write.
        events: What to mark, in both charts; the legend has each label once.
        labels: Of the two axes.

    Raises:
        DataError: There is nothing to draw, or the file cannot be written.
    """
    if not any(runs.values()):
        raise DataError(f"nothing to draw in {output}: the run has recorded no step yet")
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = canvas(8, 5.6, dpi=DPI, layout="constrained")
    loss, norm = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [2.2, 1]})
    for (name, records), color in zip(runs.items(), COLORS * len(runs), strict=False):
        prefix = f"{name}: " if len(runs) > 1 else ""
        steps, losses = _series(records, "loss")
        if events:  # a mean would rise before the onset that is marked
            loss.plot(steps, losses, color=color, linewidth=1.0, label=f"{prefix}training loss")
        else:
            loss.plot(steps, losses, color=color, alpha=0.3, linewidth=0.8)
            loss.plot(steps, _smoothed(losses), color=color, linewidth=1.8, label=f"{prefix}training loss")
        steps, losses = _series(records, "validation_loss")
        mark = VALIDATION if len(runs) == 1 else color
        if losses:
            loss.plot(steps, losses, "o-", color=mark, markersize=4, linewidth=1.0, label=f"{prefix}validation loss")
        if losses and len(runs) == 1:
            note = {"textcoords": "offset points", "xytext": (0, 9), "ha": "right", "fontsize": 9, "color": mark}
            loss.annotate(f"{losses[-1]:.2f}", (steps[-1], losses[-1]), **note)
        norm.plot(*_series(records, "grad_norm"), color=color, linewidth=1.0)
    kinds = list(dict.fromkeys(event.label for event in events))
    for event in events:
        color = EVENT_COLORS[kinds.index(event.label) % len(EVENT_COLORS)]
        for axes in (loss, norm):
            axes.axvspan(event.first, event.last, color=color, alpha=0.2, linewidth=0, zorder=0)
            axes.axvline(event.first, color=color, linewidth=0.8, alpha=0.6, zorder=0)  # the span may be a pixel's part
    for i, kind in enumerate(kinds):
        loss.plot([], [], color=EVENT_COLORS[i % len(EVENT_COLORS)], label=kind)
    loss.set_ylabel(labels[0])
    norm.set_ylabel(labels[1])
    norm.set_yscale("log")
    norm.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    norm.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    norm.yaxis.set_minor_formatter(NullFormatter())
    norm.set_xlabel("step")
    loss.legend(frameon=False, loc="upper right")
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left", color=GREY)
    for axes in (loss, norm):
        axes.grid(color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    write_file(output, png(figure))


def _series(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """Steps and values, without those where the value is missing or was not finite."""
    found = [(record["step"], record[key]) for record in records if isinstance(record.get(key), (int, float))]
    finite = [(step, float(value)) for step, value in found if isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]


def _smoothed(values: Sequence[float]) -> list[float]:
    """Mean over a centred window; it grows from the start, where a loss falls fast, and ends with the past alone."""
    most, sums, smoothed = max(1, len(values) // SMOOTH), list(accumulate(values, initial=0.0)), []
    for i in range(len(values)):
        width = min(most, i)
        last = min(i + width + 1, len(values))
        smoothed.append((sums[last] - sums[i - width]) / (last - i + width))
    return smoothed
