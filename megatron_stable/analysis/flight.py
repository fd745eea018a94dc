"""What the flight recorder kept: the measured steps before the guard saw trouble, and what stood out in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from megatron_stable.files import explain_os_errors
from megatron_stable.numbers import finite
from megatron_stable.records import jsonl
from megatron_stable.records.directory import RunDirectory
from megatron_stable.records.flight import FLIGHT
from megatron_stable.stability.events import FlightRecorded
from megatron_stable.stability.probes import Where, parse

NAME = re.compile(r"step_(\d+)\.jsonl")
SIGMA = 1.4826  # standard deviation of a normal distribution over its MAD
FLOOR = 0.05  # the least deviation that counts: of the logarithm, or of the level, and then at least
LEAST = 0.01  # of a share, or of nats
STANDS_OUT = 6.0  # deviations
FEWEST = 8  # steps from which a level can be told


@dataclass(frozen=True)
class Flight:
    """A file of the flight recorder.

    Attributes:
        first, last: The first step that it has, and the one at which it was written.
    """

    path: Path
    first: int
    last: int


@dataclass(frozen=True)
class Standout:
    """A probe that left its own level in the steps before trouble, at all layers of a point together.

    Attributes:
        name: Of the probe and the point, as tags begin.
        onset: The step from which on the first of the layers stayed away from its level; all below are of this one.
        layer: Counted from 0; ``None``: it is not of a layer.
        level, last: Its usual value, and that of the last step; ``None``: not finite.
        score: How far the last is from the level, in robust deviations; ``None``: it was not finite.
        layers, of: At how many layers it stood out, of how many.
        farthest: The layer that is farthest from its level in the end.
    """

    name: str
    onset: int
    layer: int | None
    level: float
    last: float | None
    score: float | None
    layers: int
    of: int
    farthest: int | None

    def words(self) -> str:
        """In a sentence."""
        where = "" if self.layer is None else f" at layer {self.layer}"
        now = "not finite" if self.last is None else f"{self.last:.3g}"
        factor = f", × {self.last / self.level:.3g}" if self.last is not None and self.level > 0 < self.last else ""
        text = f"{self.name}{where}: from {self.level:.3g} to {now}{factor}, since step {self.onset}"
        if self.of > 1:
            text += f"; {self.layers} of {self.of} layers" + (
                f", farthest at layer {self.farthest}" if self.farthest != self.layer else ""
            )
        return text


@dataclass(frozen=True)
class Before:
    """What stood out in the measured steps up to one step.

    Attributes:
        file: Of the flight recorder, in the run's directory.
        first, last: The steps of it that were looked at.
        standouts: What left its own level, the farthest first.
    """

    file: str
    first: int
    last: int
    standouts: tuple[Standout, ...]


def before(run: Path, step: int, data_step: int) -> Before | None:
    """What stood out up to a step; ``None``: no file of the flight recorder covers it. DataError: it cannot be read."""
    flight = covering(run, step, data_step)
    if flight is None:
        return None
    measured = [row for row in rows(flight.path) if row["step"] <= step]
    steps = [row["step"] for row in measured] or [flight.first]
    return Before(f"{FLIGHT}/{flight.path.name}", steps[0], steps[-1], tuple(standouts(measured)))


def flights(run: Path) -> list[Flight]:
    """The files of a run's flight recorder, in order of their last steps. DataError: they cannot be read."""
    found = []
    with explain_os_errors("read", run / FLIGHT):
        for path in (run / FLIGHT).glob("step_*.jsonl"):
            named = NAME.fullmatch(path.name)
            first = next((row["step"] for row in jsonl.read(path) if row and type(row.get("step")) is int), None)
            if named is not None and first is not None:
                found.append(Flight(path, first, int(named[1])))
    return sorted(found, key=lambda flight: flight.last)


def covering(run: Path, step: int, data_step: int) -> Flight | None:
    """The file that has a step, and begins long enough before it to tell what was usual; of several, the shortest one
    from then on. Steps of the same number before and after a rollback differ in how much data had been skipped."""
    written = {event.file: event for event in RunDirectory(run).ledger.read() if isinstance(event, FlightRecorded)}
    for flight in flights(run):
        event = written.get(f"{FLIGHT}/{flight.path.name}")
        same = event is None or event.data_step is None or event.data_step - event.step == data_step - step
        if flight.first <= step <= flight.last and same:
            return flight
    return None


def rows(path: Path) -> list[dict[str, Any]]:
    """The measured steps of a file, in order; what is no whole row is left out."""
    with explain_os_errors("read", path):
        found = [row for row in jsonl.read(path) if row is not None and type(row.get("step")) is int]
    return sorted(found, key=lambda row: row["step"])


def standouts(measured: Sequence[Mapping[str, Any]]) -> list[Standout]:
    """What is far from its own level in the last of these steps, the farthest first.

    The level is the median of the first half of the steps. A deviation is the scatter there from one step to the next,
    by its MAD, or 5% if that is more. A probe whose charts are logarithmic is judged by its logarithm.
    """
    steps = [row["step"] for row in measured]
    if len(steps) < FEWEST:
        return []
    groups: dict[str, list[tuple[Where, np.ndarray]]] = {}
    for key in measured[-1]:
        where = parse(key)
        if where is not None and where.head is None:
            name = key if where.layer is None else key.rpartition("/layer_")[0]
            groups.setdefault(name, []).append((where, np.array([_number(row, key) for row in measured])))
    found = [_standout(name, steps, group) for name, group in groups.items()]
    return sorted(filter(None, found), key=lambda standout: -inf if standout.score is None else -standout.score)


def _standout(name: str, steps: Sequence[int], group: Iterable[tuple[Where, np.ndarray]]) -> Standout | None:
    away: list[tuple[int, float, Where, float, float]] = []  # first step, score, of what, level, last value
    count = 0
    for where, values in group:
        count += 1
        level, scores = _scores(values, where.probe.log)
        there = np.abs(scores) >= STANDS_OUT
        if there[-1]:
            onset = steps[len(there) - int(np.argmin(there[::-1])) if not there.all() else 0]
            away.append((onset, abs(float(scores[-1])), where, level, float(values[-1])))
    if not away:
        return None
    onset, score, where, level, last = min(away, key=lambda item: (item[0], -item[1]))
    farthest = max(away, key=lambda item: item[1])[2].layer
    return Standout(name, onset, where.layer, level, finite(last), finite(score), len(away), count, farthest)


def _scores(values: np.ndarray, logarithmic: bool) -> tuple[float, np.ndarray]:
    """The usual value, and deviations from it ``[steps]``; infinite where a value is not finite."""
    usable = np.isfinite(values) & ((values > 0) if logarithmic else True)
    numbers = np.log(np.where(usable, values, 1.0)) if logarithmic else np.where(usable, values, 0.0)
    early = numbers[: len(numbers) // 2][usable[: len(numbers) // 2]]
    if early.size < FEWEST // 2:
        return float("nan"), np.zeros(len(values))
    level = float(np.median(early))
    least = FLOOR if logarithmic else max(FLOOR * abs(level), LEAST)
    changes = np.diff(early)  # their scatter is √2 times that of the values, and a slow growth does not add to it
    noise = SIGMA * float(np.median(np.abs(changes - np.median(changes)))) / sqrt(2)
    scores = (numbers - level) / max(noise, least)
    lost = ~np.isfinite(values)
    return exp(level) if logarithmic else level, np.where(lost, inf, np.where(usable, scores, 0.0))


def _number(row: Mapping[str, Any], key: str) -> float:
    value = row.get(key)
    return float(value) if isinstance(value, (int, float)) else inf
