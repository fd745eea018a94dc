"""A screening as a picture: how far windows of each source would move the model, and what the runs say."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_stable.analysis.drawing import COLORS, INK, MUTED, canvas, log_ticks, plain, tidy
from megatron_stable.study.suspects import Found

MOST = 60  # characters of a name
LOOKS = {"suspect": COLORS[1], "clear": COLORS[0], "open": MUTED}


def picture(found: Found) -> Any:
    """A dot for each window, by its step and by its loss; and the factor on the tail of gradient norms."""
    record = found.record
    figure = canvas(10.5, 1.4 + 0.42 * len(record.sources), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(3, 3, 2))
    draw = np.random.default_rng(0)
    for place, source in enumerate(record.sources):
        look = LOOKS[source.verdict]
        for axes, values in ((left, found.steps[place]), (middle, found.losses[place])):
            height = place + draw.uniform(-0.28, 0.28, len(values))
            axes.scatter(values, height, s=7, color=look, linewidths=0, alpha=0.7)
        tail = source.tail
        right.plot(tail.value, place, "o", color=look, markersize=5)
        if tail.low and tail.high:
            right.hlines(place, tail.low, tail.high, color=look, linewidth=1.4)
    names = [f"{source.name[:MOST]}: {source.verdict}" for source in record.sources]
    left.set_yticks(range(len(names)), [plain(name) for name in names])
    left.set_ylim(len(names) - 0.5, -0.5)
    left.set_xlabel("step of a window over the median's")
    middle.set_xlabel("loss of a window, robust sd")
    right.set_xlabel("factor on the tail")
    middle.set_xscale("symlog", linthresh=record.apart)
    for axes, marks in ((left, [record.far]), (middle, [-record.apart, record.apart]), (right, [record.least_tail])):
        tidy(axes)
        for mark in marks:
            axes.axvline(mark, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        if axes is not middle:
            axes.set_xscale("log")
            low, high = axes.get_xlim()
            axes.set_xticks(*log_ticks(low, high))
            axes.minorticks_off()
            axes.set_xlim(low, high)
    return figure
