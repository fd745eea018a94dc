"""Early warnings: what the probes of a run say before its loss does.

Pure and without torch: records in, events out, at a cost that does not grow with the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_stable.config.schema import Config
from megatron_stable.stability.events import EarlyWarning, WarningKind
from megatron_stable.stability.growth import ROWS, Array, Forecast, History, Window, forecast
from megatron_stable.stability.probes import PROBES, Where, places
from megatron_stable.stability.track_record import TRACK_RECORD
from megatron_stable.stability.warning_rules import RULES, Rule

AGREE = 2  # measurements in a row that must be beyond a threshold which growth leads to
FARTHEST = 4.0  # times the length of what is fitted: where an interval must end, from now
QUIET = 100  # measurements in which nothing called for a warning; then it may be said again
FITTED = ("reaches", "grows")  # kinds of rules that look at growth

Mask = NDArray[np.bool_]
Facts = dict[str, Any]


class _Column(NamedTuple):
    """A series that a rule looks at."""

    rule: Rule
    where: Where
    tag: str


class _Found(NamedTuple):
    """What speaks for a warning: how much, of which column, and the warning's facts."""

    weight: float
    column: _Column
    facts: Facts


class Watch:
    """Follows a run by its records, and warns.

    Args:
        config: The run.
        said: Warnings that were given before, oldest first, which are not repeated.
    """

    def __init__(self, config: Config, said: Iterable[EarlyWarning] = ()) -> None:
        self.config = config
        self.columns = [
            _Column(rule, where, where.tag)
            for rule in sorted(RULES, key=lambda rule: rule.kind not in FITTED)
            if rule.applies(config)
            for where in places(PROBES[rule.probe], config.model.layers)
            if not rule.points or where.point in rule.points
        ]
        rules = [column.rule for column in self.columns]
        self._fitted = slice(0, sum(rule.kind in FITTED for rule in rules))
        self._kind = np.array([rule.kind for rule in rules])
        self._linear = np.array([rule.linear for rule in rules])
        self._sign = np.where([rule.falls for rule in rules], -1.0, 1.0)
        self._per_rate = np.array([rule.per_rate for rule in rules])
        limits = np.array([rule.limit(config) for rule in rules])
        self._targets = np.where(self._linear, limits, self._sign * np.log(limits))
        self._history = History(len(rules))
        self._beyond = np.zeros(len(rules), int)  # measurements in a row beyond the threshold
        self._said: dict[tuple[str, WarningKind], EarlyWarning] = {}
        self._quiet: dict[tuple[str, WarningKind], int] = {}
        for warning in said:
            self._remember(warning)

    def update(self, step: int, record: Mapping[str, Any]) -> list[EarlyWarning]:
        """Take the record of a step, and say what is to be said now; nothing if it holds no measurements."""
        found = self._look(step, record)
        if found is None:
            return []
        warnings = []
        for key in self._quiet:
            self._quiet[key] += 1
        for (_, kind), evidence in found.items():
            warning = _warning(step, kind, sorted(evidence, key=lambda one: -one.weight), self.config)
            if self._is_news(warning):
                warnings.append(warning)
                self._remember(warning)
            self._quiet[warning.rule, kind] = 0
        return warnings

    def learn(self, step: int, record: Mapping[str, Any]) -> None:
        """Take the record of a step that was watched before, and say nothing."""
        self._look(step, record)

    def _look(self, step: int, record: Mapping[str, Any]) -> dict[tuple[str, WarningKind], list[_Found]] | None:
        """What speaks for warnings, by rule and kind; ``None``: nothing was measured."""
        values = np.array([_number(record.get(column.tag)) for column in self.columns])
        if np.isnan(values).all():
            return None
        found: dict[tuple[str, WarningKind], list[_Found]] = {}

        def note(kind: WarningKind, mask: Mask, weights: Array, facts: Callable[[int], Facts] = lambda i: {}) -> None:
            for i in np.flatnonzero(mask).tolist():
                one = _Found(float(weights[i]), self.columns[i], {"value": values[i], **facts(i)})
                found.setdefault((one.column.rule.name, kind), []).append(one)

        y = self._scaled(values, _number(record.get("learning_rate")))
        past = y >= self._targets
        self._beyond = np.where(past, self._beyond + 1, np.where(np.isnan(y), self._beyond, 0))
        enough = np.where(self._kind == "passes", 1, AGREE)
        threshold = (self._kind == "reaches") | (self._kind == "passes")
        note("past", threshold & past & (self._beyond >= enough), y - self._targets)
        above = y - _median(self._history.recent())
        note("jump", (self._kind == "jumps") & (above >= self._targets), above)
        for window in self._history.add(step, np.where(np.isfinite(y), y, np.nan)):
            self._look_ahead(window, past, note)
        return found

    def _look_ahead(self, window: Window, past: Mask, note: Callable[..., None]) -> None:
        """See what grows at a pace, and where that leads to, no farther ahead than the fit looks back."""
        kind, targets, now = self._kind[self._fitted], self._targets[self._fitted], float(window.steps[-1])
        seen = forecast(window._replace(values=window.values[:, self._fitted]), targets)
        back = (now - window.start) / 2
        near = (seen.at <= min(now + back, self.config.run.steps)) & (seen.high <= now + FARTHEST * back)
        note("ahead", (kind == "reaches") & near & ~past[self._fitted], -seen.at, lambda i: _when(seen, i))
        gain, since = seen.rate * back, round(now - back)
        note("growth", (kind == "grows") & (gain >= targets), gain, lambda i: {"since": since})

    def _scaled(self, values: Array, rate: float) -> Array:
        """What grows or shrinks exponentially made a straight line that rises towards its threshold."""
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = np.where(self._per_rate, values / rate if rate > 0 else np.nan, values)
            y = np.where(self._linear, np.abs(values), self._sign * np.log(relative))
        fallen = (self._sign < 0) & (y == np.inf)  # to 0, which is past every threshold
        return np.where(np.isfinite(y) | fallen, y, np.nan)

    def _is_news(self, warning: EarlyWarning) -> bool:
        """Whether it was not said, was long ago, or is now to come sooner than was said."""
        key = warning.rule, warning.kind
        if warning.kind == "ahead" and self._quiet.get((warning.rule, "past"), QUIET + 1) <= QUIET:
            return False  # it is there, or was just now
        if (last := self._said.get(key)) is None:
            return True
        sooner = last.interval is not None and warning.interval is not None and warning.interval[1] < last.interval[0]
        return sooner or self._quiet[key] > QUIET

    def _remember(self, warning: EarlyWarning) -> None:
        self._said[warning.rule, warning.kind] = warning
        self._quiet[warning.rule, warning.kind] = 0


def _warning(step: int, kind: WarningKind, evidence: list[_Found], config: Config) -> EarlyWarning:
    """Of evidence for one rule, the strongest first."""
    column, rule = evidence[0].column, evidence[0].column.rule
    layers = dict.fromkeys(one.column.where.layer for one in evidence)
    return EarlyWarning(
        step=step,
        rule=rule.name,
        kind=kind,
        tag=column.tag,
        layers=tuple(layer for layer in layers if layer is not None),
        what=rule.what,
        threshold=rule.limit(config),
        falls=rule.falls,
        meaning=rule.meaning,
        remedy=rule.advice(config),
        page=f"docs/methods/{rule.page}.md",
        track_record=TRACK_RECORD.get(rule.name),
        **evidence[0].facts,
    )


def _when(seen: Forecast, i: int) -> Facts:
    return {"at": round(seen.at[i]), "interval": (int(seen.low[i]), int(np.ceil(seen.high[i])))}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else np.nan


def _median(rows: Array) -> Array:
    """Of each column, where there are enough numbers."""
    if not len(rows):
        return np.full(rows.shape[1], np.nan)
    ordered, count = np.sort(rows, axis=0), np.isfinite(rows).sum(0)  # NaN comes last
    middle = np.take_along_axis(ordered, np.maximum(count - 1, 0)[None] // 2, 0)[0]
    return np.where(count >= ROWS // 4, middle, np.nan)
