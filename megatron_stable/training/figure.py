"""The curves of runs as a picture: training and validation loss, and the gradient norm, over steps."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_stable.data.files import write_file
from megatron_stable.errors import DataError
from megatron_stable.stability.ledger import read_lines
from megatron_stable.training.callbacks import Record

COLORS = ["#1f5fa8", "#c8501e", "#2a8a4a", "#7a4aa0"]  # one per run
VALIDATION, GREY = "#111111", "#666666"
SMOOTH = 50  # the smoothed training loss averages over this fraction of the run to each side


def read_metrics(path: Path) -> list[Record]:
    """The records of ``metrics.jsonl`` in order of steps; of several for a step, the last."""
    by_step = {line["step"]: line for line in read_lines(path) if isinstance(line.get("step"), int)}
    return [by_step[step] for step in sorted(by_step)]


def draw(runs: Mapping[str, Sequence[Record]], output: Path, title: str = "") -> None:
    """Write a PNG with the curves of one or more runs.

    Args:
        runs: Records, as `read_metrics` returns them, by what the legend shall call them.
        output: The file to write.

    Raises:
        DataError: There is nothing to draw, or the file cannot be written.
    """
    if not any(runs.values()):
        raise DataError(f"nothing to draw in {output}: the run has recorded no step yet")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import; no window, no global state
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(8, 5.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    loss, norm = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [2.2, 1]})
    for (name, records), color in zip(runs.items(), COLORS * len(runs), strict=False):
        prefix = f"{name}: " if len(runs) > 1 else ""
        steps, losses = _series(records, "loss")
        loss.plot(steps, losses, color=color, alpha=0.3, linewidth=0.8)
        loss.plot(steps, _smoothed(losses), color=color, linewidth=1.8, label=f"{prefix}training loss")
        steps, losses = _series(records, "validation_loss")
        mark = VALIDATION if len(runs) == 1 else color
        loss.plot(steps, losses, "o-", color=mark, markersize=4, linewidth=1.0, label=f"{prefix}validation loss")
        if losses and len(runs) == 1:
            note = {"textcoords": "offset points", "xytext": (0, 9), "ha": "right", "fontsize": 9, "color": mark}
            loss.annotate(f"{losses[-1]:.2f}", (steps[-1], losses[-1]), **note)
        norm.plot(*_series(records, "grad_norm"), color=color, linewidth=1.0)
    loss.set_ylabel("cross-entropy (nats per token)")
    norm.set_ylabel("gradient norm")
    norm.set_yscale("log")
    norm.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    norm.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    norm.yaxis.set_minor_formatter(NullFormatter())
    norm.set_xlabel("step")
    loss.legend(frameon=False, loc="upper right")
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left", color=GREY)
    for axes in (loss, norm):
        axes.grid(color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_file(output, picture.getvalue())


def _series(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """Steps and values, without those where the value is missing or was not finite."""
    found = [(record["step"], record[key]) for record in records if isinstance(record.get(key), (int, float))]
    return [step for step, _ in found], [float(value) for _, value in found]


def _smoothed(values: Sequence[float]) -> list[float]:
    """Mean over a centred window; it grows from the start, where a loss falls fast, and ends with the past alone."""
    most, smoothed = max(1, len(values) // SMOOTH), []
    for i in range(len(values)):
        width = min(most, i)
        window = values[i - width : i + width + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed
