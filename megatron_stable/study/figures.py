"""The figures of a sweep, as the papers draw them: loss and what was measured, over learning rate and parameters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import isfinite
from typing import NamedTuple

import numpy as np

from megatron_stable.analysis.report.figures import Drawn
from megatron_stable.numbers import finite
from megatron_stable.study.criteria import best_of, diverged
from megatron_stable.study.outputs import ALIKE, outputs
from megatron_stable.study.panels import BARE, FULL, HOLLOW, Line, Panel, Point, draw, short
from megatron_stable.study.reading import Sweep
from megatron_stable.study.sensitivity import Group, sensitivity, word

LINES, PANELS = 10, 12  # in a panel, and in a figure, at most

SPREAD = "Bars reach from the least to the greatest of the seeds; a hollow point lacks a seed. Crosses: diverged."
PROBES = {
    "attention/max_logit": (
        "max_logit",
        "Largest attention logit",
        "Mean over the last tenth of the run, of the layer with the largest. Without a norm on queries and keys it "
        "grows with learning rate and parameters; arXiv 2309.14322 (§3.1) saw every run above 10,000 diverge.",
    ),
    "grad_rms/fc1": (
        "grad_rms",
        "Gradient RMS of FC1",
        "Mean over the last tenth of the run, of the layer with the smallest. It falls as model and learning rate "
        "grow; near Adam's ε, the dotted line, updates vanish (arXiv 2309.14322, §3.4).",
    ),
}


def figures(sweep: Sweep) -> Iterator[Drawn]:
    """Draw those for which there is something to draw, one after another."""
    yield from _loss(sweep)
    yield from _sensitivity(sweep.groups)
    for column, (name, title, caption) in PROBES.items():
        yield from _probe(sweep, column, name, title, caption)
    yield from outputs(sweep.groups, sweep.probes)


class Split(NamedTuple):
    """Groups as panels of lines: titles, with the groups by what the legend calls them; what there was no room for."""

    panels: dict[str, dict[str, Group]]
    legend: str
    left_out: str


def split(groups: Sequence[Group]) -> Split:
    """Panels by the axis of fewest values, unless its panels have too many lines and another's do not."""
    values = {axis: len({json.dumps(group.values[axis]) for group in groups}) for axis in groups[0].values}
    ordered = sorted(values, key=lambda axis: values[axis]) if len(values) > 1 else []
    across = next((axis for axis in ordered if len(groups) / values[axis] <= LINES), next(iter(ordered), None))
    others = [axis for axis in values if axis != across]
    panels: dict[str, dict[str, Group]] = {}
    for group in groups:
        panel = panels.setdefault("" if across is None else word(across, group.values[across]), {})
        panel[" · ".join(word(axis, group.values[axis]) for axis in others) or group.name] = group
    lines = list(dict.fromkeys(line for panel in panels.values() for line in panel))
    shown = {
        title: {line: group for line, group in panels[title].items() if line in lines[:LINES]}
        for title in [*panels][:PANELS]
    }
    return Split(shown, " · ".join(_short(axis) for axis in others), left_out([*panels][PANELS:] + lines[LINES:]))


def left_out(names: Sequence[str]) -> str:
    """What a caption says of that for which a figure has no room."""
    return f" Left out for want of room: {', '.join(names)}." if names else ""


def _short(axis: str) -> str:
    return axis.rpartition(".")[2].replace("_", " ")


def _loss(sweep: Sweep) -> Iterator[Drawn]:
    rates, parts, panels = dict(enumerate(sweep.rates)), split(sweep.groups), []
    for title, lines in parts.panels.items():
        drawn = [_over_seeds(line, group, rates, "score") for line, group in lines.items()]
        start = [known for group in lines.values() for row in group.rows if (known := finite(row.get("initial_loss")))]
        lost = start and any(line.crosses for line in drawn)  # else it would be far above all there is to see
        panels.append(Panel(title, drawn, (float(np.mean(start)), "at initialisation") if lost else None))
    if any(isfinite(point.y) for panel in panels for line in panel.lines for point in line.points):
        yield Drawn(
            "loss", "Loss against learning rate", "Final loss, or that at initialisation where it is less or the run "
            f"diverged; mean over seeds. {SPREAD}{parts.left_out}",
            draw(panels, "learning rate", "loss (nats per token)", parts.legend),
        )  # fmt: skip


def _over_seeds(label: str, group: Group, places: dict[int, float], column: str, log: bool = False) -> Line:
    """A column of a group's runs, mean over seeds at each of some learning rates.

    Args:
        places: Where to draw each, by its place among the sweep's.
        log: Whether to take the mean of logarithms.
    """
    points, crosses, best = [], [], best_of(group.rows)
    for place, x in places.items():
        runs = [curve[place] for curve in group.curves.values()]
        if not any(runs):  # this group was not to have this rate; where a run is lost, the line breaks
            continue
        there = [(row, value) for row in runs if row is not None and (value := finite(row.get(column))) is not None]
        there = [(row, value) for row, value in there if value > 0]
        values = [value for _, value in there] or [float("nan")]
        mean = np.exp(np.mean(np.log(values))) if log else np.mean(values)
        lost = [(x, value) for row, value in there if diverged(row, best)]
        mark = BARE if len(lost) == len(there) and len(set(lost)) == 1 else HOLLOW if len(there) < len(runs) else FULL
        points.append(Point(x, float(mean), min(values), max(values), mark))
        crosses += lost
    return Line(label, points, sorted(set(crosses)))


def families(groups: Sequence[Group]) -> tuple[dict[str, list[Group]], str]:
    """Groups that differ in size alone, by what they share, each by rising parameters; and what tells these apart."""
    known = [group for group in groups if group.parameters]
    others = [axis for axis in groups[0].values if not _is_size(axis, known)]
    found: dict[str, list[Group]] = {}
    for group in sorted(known, key=lambda group: group.parameters or 0):
        found.setdefault(" · ".join(word(axis, group.values[axis]) for axis in others), []).append(group)
    order = [" · ".join(word(axis, group.values[axis]) for axis in others) for group in known]
    return {name: found[name] for name in dict.fromkeys(order)}, " · ".join(_short(axis) for axis in others)


def _is_size(axis: str, groups: Sequence[Group]) -> bool:
    """Whether groups that differ on this axis alone differ in their parameters, by more than a norm's."""
    alike: dict[str, list[int]] = {}
    for group in groups:
        rest = json.dumps({other: value for other, value in group.values.items() if other != axis})
        alike.setdefault(rest, []).append(group.parameters or 0)
    return any(max(found) > ALIKE * min(found) for found in alike.values())


def _sensitivity(groups: Sequence[Group]) -> Iterator[Drawn]:
    found, legend = families(groups)
    lines = []
    for name, members in found.items():
        points = []
        for group in members:
            estimate = sensitivity(group)
            if estimate.value and group.parameters:
                low, high = estimate.interval or (estimate.value, estimate.value)
                points.append(Point(group.parameters, estimate.value, low, high, HOLLOW if estimate.missing else FULL))
        lines.append(Line(name, points))
    if any(len(line.points) > 1 for line in lines):
        omitted = left_out([line.label for line in lines[LINES:]])
        panel = Panel("", lines[:LINES])
        yield Drawn(
            "sensitivity", "LR sensitivity against parameters", "Mean excess of the loss over its least, over the "
            "sweep's learning rates; parameters without embedding and head. Bars: 95% intervals, bootstrap over seeds. "
            f"Hollow: a lower bound, as runs are missing.{omitted}",
            draw([panel], "parameters", "LR sensitivity (nats per token)", legend),
        )  # fmt: skip


def _probe(sweep: Sweep, column: str, name: str, title: str, caption: str) -> Iterator[Drawn]:
    """A probe's last values: against parameters by learning rate, or against learning rate where there is one size."""
    if not any(finite(row.get(column)) for row in sweep.rows):
        return
    rates, (found, _) = sweep.rates, families(sweep.groups)
    epsilons = {finite(row.get("optimizer.eps")) for row in sweep.rows} if column.startswith("grad") else set()
    epsilon = epsilons.pop() if len(epsilons) == 1 else None
    level = None if epsilon is None else (epsilon, "Adam's ε")
    if any(len(members) > 1 for members in found.values()):
        shown = rates[:: -(-len(rates) // LINES)]
        panels = [
            Panel(family, [_over_sizes(members, rates.index(rate), rate, column) for rate in shown], level)
            for family, members in [*found.items()][:PANELS]
        ]
        x, legend = "parameters", "learning rate"
        omitted = left_out([*[*found][PANELS:], *(short(rate) for rate in rates if rate not in shown)])
    else:
        parts, places, panels = split(sweep.groups), dict(enumerate(rates)), []
        for part, lines in parts.panels.items():
            drawn = [_over_seeds(line, group, places, column, log=True) for line, group in lines.items()]
            panels.append(Panel(part, drawn, level))
        x, legend, omitted = "learning rate", parts.legend, parts.left_out
    picture = draw(panels, x, title[0].lower() + title[1:], legend)
    yield Drawn(name, f"{title} against {x}", f"{caption} {SPREAD}{omitted}", picture)


def _over_sizes(members: Sequence[Group], place: int, rate: float, column: str) -> Line:
    """A column at one learning rate, of groups that differ in size."""
    parts = [_over_seeds("", group, {place: float(group.parameters or 0)}, column, log=True) for group in members]
    points, crosses = (
        [each for part in parts for each in part.points],
        [each for part in parts for each in part.crosses],
    )
    return Line(short(rate), points, crosses)
