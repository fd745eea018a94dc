"""The logbook: the ledger as a page that the next shift reads, ``RUN/logbook.md``."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from itertools import groupby
from math import isfinite
from typing import Any, TypeGuard

from megatron_stable.data.skip import SkipWindows
from megatron_stable.errors import ConfigError

Event = dict[str, Any]
SERIES = {"loss": "loss", "grad_norm": "gradient norm"}
WRONG = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, ConfigError)  # facts of other kinds
MARKUP = re.compile(r"[\\`*{}\[\]<>#|~!&$^]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
LAYOUT = {"tensor": "TP", "pipeline": "PP", "sequence": "SP", "zero_stage": "ZeRO"}
UNDATED, STRANGE = "without a date", "not finite"
FLURRY = 10  # steps: events of a kind that are no further apart are told together


def render(events: Sequence[Event]) -> str:
    """The page, in Markdown: how things stand, then what happened, by day.

    Args:
        events: As `Ledger.read` returns them. Unknown ones, and unknown facts of known ones, are told as they are.
    """
    lines = ["# Logbook", ""]
    if not events:
        return "\n".join([*lines, "Nothing has happened yet.", ""])
    lines += [f"- {name}: {_markdown(text)}" for name, text in _state(events)]
    for day, of_day in groupby(events, key=lambda event: _when(event)[0]):
        lines += ["", f"## {_markdown(day)}", ""]
        lines += [f"- {_markdown(_line(group))}" for group in _flurries(of_day)]
    return "\n".join([*lines, "", "Each event with all its numbers is in `ledger.jsonl`; times are UTC.", ""])


def sentence(event: Event) -> str:
    """An event in plain words, with its step and its numbers; one line, safe on a terminal."""
    facts = {key: value for key, value in event.items() if key not in ("time", "event", "step")}
    where = _where(event, facts)
    try:
        told = dict(facts)
        text = SENTENCES[event["event"]](told)
        facts = told
    except WRONG:
        text = _value(event.get("event", "an event without a name"))
    rest = "; ".join(f"{_value(key)} {_value(value)}" for key, value in facts.items())
    return f"{where}{text}{f' ({rest})' if rest else ''}"


def _line(group: Sequence[Event]) -> str:
    """An event, or several of a kind as one, with the time."""
    clock = _when(group[0])[1]
    if len(group) == 1:
        return f"{clock}{sentence(group[0])}"
    kind, steps = group[0]["event"], _range(group, "step")
    data = f" (data steps {_range(group, 'data_step')})" if any("data_step" in event for event in group) else ""
    return f"{clock}steps {steps}{data}: {FLURRIES[kind](group)}"


# ---- how things stand ----


def _state(events: Sequence[Event]) -> Iterable[tuple[str, str]]:
    """(what, how it is): the last event, counts, and what is in force."""
    last = events[-1]
    day, clock = _when(last)
    yield "last event", f"{'' if day == UNDATED else f'{day} '}{clock}{sentence(last)}"
    if open_ := _open_excursions(events):
        yield "not over yet", "; ".join(open_)
    kinds = Counter(_text(event.get("event")) for event in events)
    by_series = Counter(_series(event) for event in events if event.get("event") == "spike")
    spikes = ", ".join(f"{n} of the {name}" for name, n in by_series.items()) or "none"
    yield "spikes", spikes + _counted(kinds, {"divergence": "became a divergence", "shift": "a new level"})
    rules = Counter(_text(event.get("rule", "unknown")) for event in events if event.get("event") == "drop")
    yield "dropped updates", f"{kinds['drop']}{_reasons(rules)}"
    by = Counter(_text(event.get("by", "unknown")) for event in events if event.get("event") == "rollback")
    yield "rollbacks", f"{kinds['rollback']}{_reasons(by, 'by the ')}" + _counted(kinds, {"undo": "undone"})
    repairs = _in_force(events)
    windows = _windows(repairs)
    skipped = sum(last - first + 1 for first, last in windows)
    spans = ", ".join(f"{first}-{last}" for first, last in windows)
    yield "data steps that repairs skip", f"{spans} ({skipped} in all)" if windows else "none"
    yield "learning rate", f"× {_product(repairs, 'learning_rate_factor')}"
    yield "gradient clipping", f"× {_product(repairs, 'clip_factor')}"


def _counted(kinds: Counter[str], words: dict[str, str]) -> str:
    return "".join(f"; {kinds[kind]} {word}" for kind, word in words.items() if kinds[kind])


def _reasons(counts: Counter[str], word: str = "") -> str:
    return f" ({', '.join(f'{n} {word}{reason}' for reason, n in counts.items())})" if counts else ""


def _open_excursions(events: Iterable[Event]) -> list[str]:
    """Spikes and divergences that no later event ends."""
    found: dict[str, str] = {}
    for event in events:
        kind, series = event.get("event"), _series(event)
        if kind in ("spike", "divergence"):
            found[series] = f"{kind} of the {series} since step {_value(event.get('onset') or event.get('step'))}"
        elif kind in ("spike_end", "shift"):
            found.pop(series, None)
        elif kind in ("rollback", "gave_up", "undo"):
            found.clear()
    return list(found.values())


def _in_force(events: Iterable[Event]) -> list[Event]:
    """The repairs that were made and not undone."""
    repairs: list[Event] = []
    for event in events:
        if event.get("event") in ("rollback", "gave_up") and "rollback_to" in event:
            repairs.append(event)
        elif event.get("event") == "undo":
            named = [repair for repair in repairs if repair.get("id") == event.get("id")]
            for repair in named or repairs[-1:]:
                repairs.remove(repair)
    return repairs


def _windows(repairs: Iterable[Event]) -> tuple[tuple[int, int], ...]:
    windows = SkipWindows()
    for repair in repairs:
        try:
            for first, last in repair.get("windows") or ():
                windows = windows.add(first, last)
        except WRONG:
            continue
    return windows.windows


def _product(repairs: Iterable[Event], key: str) -> str:
    product = 1.0
    for repair in repairs:
        factor = repair.get(key)
        product *= factor if _is_number(factor) else 1.0
    return f"{product:.4g}"


# ---- events that come in numbers ----


def _flurries(events: Iterable[Event]) -> list[list[Event]]:
    """Events in groups to be told as one: those of a kind, and of a series, that lie close to each other with nothing
    else in between but others such."""
    groups: list[list[Event]] = []
    open_: dict[Any, list[Event]] = {}
    for event in events:
        kind, step = event.get("event"), event.get("step")
        if not isinstance(kind, str) or kind not in FLURRIES or not isinstance(step, int):
            open_ = {}
            groups.append([event])
            continue
        key = (kind, _series(event))
        if key in open_ and 0 <= step - open_[key][-1]["step"] <= FLURRY:
            open_[key].append(event)
        else:
            open_[key] = [event]
            groups.append(open_[key])
    return groups


def _drops(group: Sequence[Event]) -> str:
    rules = Counter(_text(event.get("rule", "unknown")) for event in group)
    by = ", ".join(dict.fromkeys(_text(event["by"]) for event in group if "by" in event))
    parts = [f"{len(group)} updates dropped" + (f" by the {by}" if by else "") + _reasons(rules)]
    parts += [f"{name} {_range(group, key)}" for key, name in SERIES.items() if any(key in event for event in group)]
    parts += [f"{_range(group, 'consecutive', most=True)} in a row"] if any("consecutive" in e for e in group) else []
    parts += [f"total {_value(group[-1]['total'])}"] if "total" in group[-1] else []
    return ", ".join(parts)


def _spikes(group: Sequence[Event]) -> str:
    highest, score = _range(group, "value", most=True), _range(group, "score", most=True)
    far = "infinitely far" if score == STRANGE else f"up to {score} MADs"
    return f"{len(group)} spikes of the {_series(group[0])}, the highest {highest}, {far} above its level"


def _spike_ends(group: Sequence[Event]) -> str:
    return f"the {_series(group[0])} fell back {len(group)} times, after {_range(group, 'duration')} steps"


FLURRIES: dict[str, Callable[[Sequence[Event]], str]] = {"drop": _drops, "spike": _spikes, "spike_end": _spike_ends}


def _range(group: Sequence[Event], key: str, most: bool = False) -> str:
    """The least and the greatest value of a fact, or only the greatest."""
    values = [event[key] for event in group if key in event]
    finite = [value for value in values if _is_number(value)]
    strange = STRANGE if len(finite) < len(values) else ""
    if not finite:
        return strange or "unknown"
    if most:
        return strange or _value(max(finite))
    low, high = _value(min(finite)), _value(max(finite))
    return (low if low == high else f"{low} to {high}") + (f" and {strange}" if strange else "")


# ---- events one by one: each takes the facts it tells out of them ----


def _part(facts: Event, key: str, form: str, missing: str = "") -> str:
    """A fact in words, or nothing if there is none; ``missing``: the word for null."""
    if key not in facts:
        return ""
    value = facts.pop(key)
    return form.format(missing if value is None and missing else _value(value)) if value is not None or missing else ""


def _start(facts: Event, words: str = "training began") -> str:
    layout = (facts.pop("layout", None) or {}).items()
    parts = [_part(facts, "ranks", "ranks {}")]
    parts += [f"{LAYOUT.get(key, _text(key))} {_value(value)}" for key, value in layout if value is not False]
    changed = facts.pop("changed", None) or {}
    changes = [f"{_text(key)} {_value(before)} → {_value(now)}" for key, (before, now) in changed.items()]
    where = ", ".join(filter(None, parts))
    return words + (f" ({where})" if where else "") + (f"; changed: {', '.join(changes)}" if changes else "")


def _resume(facts: Event) -> str:
    return _start(facts, "training went on")


def _override(facts: Event) -> str:
    return _start(facts, "the configuration overrides what the checkpoint holds" + _by(facts))


def _excursion(facts: Event, words: str) -> str:
    series = SERIES.get(_text(facts.get("series", "loss")), _text(facts.get("series")))
    facts.pop("series", None)
    parts = (
        _part(facts, "value", "{}", STRANGE),
        _part(facts, "score", "{} MADs above its level"),
        _part(facts, "level", "level {}"),
        _part(facts, "scale", "MAD {}"),
        _part(facts, "onset", "began at step {}"),
        _part(facts, "by", "found by the {}"),
    )
    return words.format(series) + ": " + ", ".join(filter(None, parts))


def _spike(facts: Event) -> str:
    return _excursion(facts, "spike of the {}")


def _divergence(facts: Event) -> str:
    return _excursion(facts, "the {} diverges, it does not fall back")


def _shift(facts: Event) -> str:
    return _excursion(facts, "the {} has moved to another level, the usual one from here")


def _spike_end(facts: Event) -> str:
    series = _series(facts)
    facts.pop("series", None)
    parts = (
        _part(facts, "duration", "duration {}"),
        _part(facts, "onset", "began at step {}"),
        _part(facts, "peak", "peak {}", STRANGE),
    )
    return f"the {series} has fallen back: " + ", ".join(filter(None, parts))


def _drop(facts: Event) -> str:
    parts = (
        _part(facts, "rule", "{}"),
        _part(facts, "loss", "loss {}", STRANGE),
        _part(facts, "grad_norm", "gradient norm {}", STRANGE),
        _part(facts, "consecutive", "{} in a row"),
        _part(facts, "total", "total {}"),
    )
    return f"update dropped{_by(facts)}: " + ", ".join(filter(None, parts))


def _rollback(facts: Event, words: str = "went back") -> str:
    windows = facts.pop("windows", None) or ()
    spans = ", ".join(f"{_value(first)}-{_value(last)}" for first, last in windows)
    back = _part(facts, "rollback_to", " to step {}") + _by(facts)
    why = ", ".join(filter(None, (_part(facts, "rule", "{}"), _part(facts, "onset", "began at step {}"))))
    changes = (
        f"skips data steps {spans}" if spans else "",
        _changed(facts, "learning_rate_factor", "learning rate"),
        _changed(facts, "clip_factor", "gradient clipping"),
        "loss scale reset" if facts.pop("reset_loss_scale", False) else "",
        _part(facts, "attempt", "attempt {}"),
    )
    parts = ("; ".join(filter(None, changes)), _part(facts, "reason", "{}"), _part(facts, "id", "id {}"))
    return f"{words}{back}{f' ({why})' if why else ''}: " + ". ".join(filter(None, parts))


def _changed(facts: Event, key: str, name: str) -> str:
    factor = facts.pop(key, 1)
    return f"{name} × {_value(factor)}" if factor != 1 else ""


def _undo(facts: Event) -> str:
    return "rollback" + _part(facts, "id", " {}") + " undone" + _by(facts)


def _loss_scale_floor(facts: Event) -> str:
    norms = facts.pop("norms", None) or {}
    layers = ", ".join(f"{_text(k)} {STRANGE if v is None else _value(v)}" for k, v in norms.items())
    parts = (
        _part(facts, "scale", "{}"),
        _part(facts, "module", "first module with values that are not finite: {}", "none"),
        f"gradient norms: {layers}" if layers else "",
    )
    return "the loss scale is at its floor: " + "; ".join(filter(None, parts))


def _gave_up(facts: Event) -> str:
    words = "gave up" + _part(facts, "attempts", " after {} attempts")
    return _rollback(facts, f"{words}, went back" if "rollback_to" in facts else words).removesuffix(": ")


def _stop(facts: Event) -> str:
    parts = (_part(facts, "exit_code", "exit code {}"), _part(facts, "reason", "{}"))
    return "stopped: " + ", ".join(filter(None, parts))


def _by(facts: Event) -> str:
    return _part(facts, "by", " by the {}")


SENTENCES: dict[str, Callable[[Event], str]] = {
    "start": _start,
    "resume": _resume,
    "override": _override,
    "spike": _spike,
    "spike_end": _spike_end,
    "divergence": _divergence,
    "shift": _shift,
    "drop": _drop,
    "rollback": _rollback,
    "undo": _undo,
    "loss_scale_floor": _loss_scale_floor,
    "gave_up": _gave_up,
    "stop": _stop,
}


# ---- words ----


def _series(event: Event) -> str:
    name = _text(event.get("series", "loss"))
    return SERIES.get(name, name)


def _where(event: Event, facts: Event) -> str:
    step = f"step {_value(event['step'])}" if event.get("step") is not None else ""
    data_step = facts.pop("data_step", None)
    data = f"data step {_value(data_step)}" if data_step is not None else ""
    where = f"{step} ({data})" if step and data else step or data
    return f"{where}: " if where else ""


def _when(event: Event) -> tuple[str, str]:
    """Day, and ``"12:34:56 · "``, in UTC; a time that is none is told as it is."""
    time = event.get("time")
    try:
        at = datetime.fromisoformat(time.replace("Z", "+00:00")).astimezone(timezone.utc)  # type: ignore[union-attr]
    except (*WRONG, OSError):
        return UNDATED, f"{_value(time)} · " if time is not None else ""
    return at.date().isoformat(), f"{at:%H:%M:%S} · "


def _value(value: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float):
        return f"{value:.4g}" if isfinite(value) else STRANGE
    return _text(json.dumps(value, default=str))


def _is_number(value: Any) -> TypeGuard[float]:
    try:
        return type(value) in (int, float) and isfinite(value)
    except OverflowError:
        return False


def _text(value: Any) -> str:
    """One line, with what does not print as Python's escapes."""
    line = " ".join(str(value).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in line)


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is."""
    return MARKUP.sub(lambda match: f"\\{match[0]}", text)
