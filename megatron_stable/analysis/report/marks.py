"""Where events are marked in charts: trouble, what was decided about it, and what was said before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from megatron_stable.analysis.drawing import COLORS, INK, MUTED, style
from megatron_stable.analysis.report.run import Run
from megatron_stable.stability.events import Event, GaveUp, Rollback, Surgery

KINDS = {  # how the kinds of events are drawn; all others are in the list alone
    "trouble": ("spike", "rise", "divergence"),
    "decision": ("drop", "rollback", "gave_up", "surgery", "loss_scale_floor"),
    "warning": ("warning", "flight_recorded"),
}
LOOKS: dict[str, dict[str, Any]] = {
    "trouble": {"color": COLORS[1], "linestyle": (0, (1.2, 1.8)), "marker": "v"},
    "decision": {"color": INK, "linestyle": "-", "marker": "s"},
    "warning": {"color": COLORS[3], "linestyle": (0, (5, 2)), "marker": "o"},
}
LEGEND = (
    "dotted and ▾: a spike, rise or divergence begins; solid and ▪: an update dropped, a rollback, surgery, a run "
    "that is given up; dashed and ●: a warning, or the flight recorder; grey: steps that a rollback went back behind"
)


class Marks(NamedTuple):
    """What is marked in a run's charts.

    Attributes:
        steps: Of events, by how they are drawn.
        behind: Stretches of steps, first and last, that rollbacks went back behind.
    """

    steps: dict[str, list[int]]
    behind: list[tuple[int, int]]


def marks(events: Iterable[Event]) -> Marks:
    """What to mark of a ledger."""
    steps: dict[str, set[int]] = {look: set() for look in KINDS}
    behind = []
    for event in events:
        look = next((look for look, kinds in KINDS.items() if event.event in kinds), None)
        if look is not None and isinstance(event.step, int):
            onset = getattr(event, "onset", None) if look == "trouble" else None
            steps[look].add(onset or event.step)
        if isinstance(event, (Rollback, GaveUp, Surgery)) and event.rollback_to is not None:
            behind.append((event.rollback_to, event.step))
    return Marks({look: sorted(found) for look, found in steps.items()}, behind)


def draw_marks_of(axes: Any, runs: Sequence[Run]) -> None:
    """Mark the events of runs that share a chart: of several, each in its colour, at the upper edge alone."""
    for number, run in enumerate(runs):
        draw_marks(axes, run, lines=len(runs) == 1, color=style(number)["color"] if len(runs) > 1 else None)


def draw_marks(axes: Any, run: Run, lines: bool, color: str | None = None) -> None:
    """Mark a run's events in a chart over its steps.

    Args:
        lines: Whether to draw lines through the chart too, and not at its upper edge alone.
        color: In place of those that tell the kinds apart.
    """
    found, width = marks(run.events), run.curves.series.width
    above = axes.get_xaxis_transform()
    for first, last in found.behind if lines else ():
        axes.axvspan(first, last, color=MUTED, alpha=0.12, linewidth=0, zorder=0)
    for kind, steps in found.steps.items():
        look = LOOKS[kind]
        apart = sorted({(step - 1) // width: step for step in steps}.values())  # one of each stretch
        if not apart:
            continue
        axes.plot(
            apart, [1.03] * len(apart), look["marker"], transform=above, color=color or look["color"], markersize=4.5,
            markeredgewidth=0, clip_on=False, zorder=5, scalex=False, scaley=False,
        )  # fmt: skip
        if lines:
            axes.vlines(
                apart, 0, 1, transform=above, linewidth=0.7, alpha=0.8, zorder=1, colors=look["color"],
                linestyles=[look["linestyle"]],
            )  # fmt: skip
