"""A screening as a picture: how far windows of each source would move the model, and what the runs say."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_stable.analysis.drawing import COLORS, GRID, INK, MUTED, canvas, log_ticks, plain, tidy
from megatron_stable.study.suspects import Found

MOST = 60  # characters of a name
LOOKS = {"suspect": COLORS[1], "clear": COLORS[0], "open": MUTED}


def picture(found: Found) -> Any:
    """Left a dot for each window; right the factor on the tail of gradient norms, with its simultaneous interval."""
    sources = found.record.sources
    figure = canvas(9.5, 1.4 + 0.42 * len(sources), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    draw = np.random.default_rng(0)
    for place, (source, steps) in enumerate(zip(sources, found.steps, strict=True)):
        look = LOOKS[source.verdict]
        height = place + draw.uniform(-0.28, 0.28, len(steps))
        left.scatter(steps, height, s=7, color=look, linewidths=0, alpha=0.7)
        tail = source.tail
        right.plot(tail.value, place, "o", color=look, markersize=5)
        if tail.low and tail.high:
            right.hlines(place, tail.low, tail.high, color=look, linewidth=1.4)
    names = [f"{source.name[:MOST]}: {source.verdict}" for source in sources]
    left.set_yticks(range(len(sources)), [plain(name) for name in names])
    left.set_ylim(len(sources) - 0.5, -0.5)
    left.set_xlabel(f"step of a window over the median's; {found.record.stands_out:g} and more stand out")
    right.set_xlabel(f"factor on the tail; {found.record.least_tail:g} matters")
    for axes, threshold in ((left, found.record.stands_out), (right, found.record.least_tail)):
        tidy(axes)
        axes.set_xscale("log")
        axes.axvline(1, color=GRID, linewidth=1, zorder=0)
        axes.axvline(threshold, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        low, high = axes.get_xlim()
        axes.set_xticks(*log_ticks(low, high))
        axes.minorticks_off()
        axes.set_xlim(low, high)
    return figure
