"""The logbook: the ledger as a page that the next shift reads, ``RUN/logbook.md``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from itertools import groupby
from math import prod
from typing import TypeAlias

from megatron_stable.data.skip import merged
from megatron_stable.stability.event import one_line
from megatron_stable.stability.events import (
    SERIES,
    Divergence,
    Drop,
    Event,
    GaveUp,
    Rise,
    Rollback,
    SecondOpinion,
    Shift,
    Spike,
    SpikeEnd,
    Surgery,
    Undo,
)

MARKUP = re.compile(r"[\\`*{}\[\]<>#|~!&$^]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
FLURRY = 10  # steps: events of a kind that are no further apart are told together
UNDATED = "without a date"
Frequent: TypeAlias = Drop | Spike | SpikeEnd


def render(events: Sequence[Event]) -> str:
    """The page, in Markdown: how things stand, then what happened, by day."""
    lines = ["# Logbook", ""]
    if not events:
        return "\n".join([*lines, "Nothing has happened yet.", ""])
    lines += [f"- {name}: {_markdown(text)}" for name, text in _state(events)]
    for day, of_day in groupby(events, key=lambda event: _when(event)[0]):
        lines += ["", f"## {day}", ""]
        lines += [f"- {_markdown(_line(group))}" for group in _flurries(of_day)]
    return "\n".join([*lines, "", "Each event with all its numbers is in `ledger.jsonl`; times are UTC.", ""])


# ---- how things stand ----


def _state(events: Sequence[Event]) -> Iterator[tuple[str, str]]:
    """(what, how it is): the last event, counts, and what is in force."""
    day, clock = _when(events[-1])
    yield "last event", f"{'' if day == UNDATED else f'{day} '}{clock}{events[-1].sentence()}"
    if open_ := _open_excursions(events):
        yield "not over yet", "; ".join(open_)
    kinds = Counter(type(event) for event in events)
    yield "spikes", _counted(f"of the {SERIES[e.series]}" for e in events if isinstance(e, Spike)) or "none"
    yield "dropped updates", _with_reasons(e.rule for e in events if isinstance(e, Drop))
    if kinds[SecondOpinion]:
        yield "second opinions", _with_reasons(e.VERDICTS[e.verdict] for e in events if isinstance(e, SecondOpinion))
    undone = f"; {kinds[Undo]} taken back" if kinds[Undo] else ""
    yield "rollbacks", _with_reasons(f"by the {e.by}" for e in events if isinstance(e, Rollback)) + undone
    if kinds[Surgery]:
        yield "surgery", _with_reasons(f"by the {e.by}" for e in events if isinstance(e, Surgery))
    made = _in_force(events)
    windows = _windows(made)
    spans = ", ".join(f"{first}-{last}" for first, last in windows)
    skipped = sum(last - first + 1 for first, last in windows)
    yield "data steps that rollbacks skip", f"{spans} ({skipped} in all)" if windows else "none"
    yield "learning rate", f"× {prod(event.learning_rate_factor for event in made):.4g}"
    yield "gradient clipping", f"× {prod(event.clip_factor for event in made):.4g}"


def _open_excursions(events: Iterable[Event]) -> list[str]:
    """Spikes, rises and divergences that no later event ends."""
    found: dict[str, str] = {}
    for event in events:
        if isinstance(event, (Spike, Rise, Divergence)):
            found[event.series] = f"{event.event} of the {SERIES[event.series]} since step {event.onset}"
        elif isinstance(event, SpikeEnd):
            found.pop(event.series, None)
        elif isinstance(event, Shift):
            found.pop("loss", None)
        elif isinstance(event, (Rollback, GaveUp, Surgery, Undo)):
            found.clear()
    return list(found.values())


def _in_force(events: Iterable[Event]) -> list[Rollback | GaveUp]:
    """Rollbacks that were not taken back."""
    made: list[Rollback | GaveUp] = []
    for event in events:
        if isinstance(event, (Rollback, GaveUp)) and event.rollback_to is not None:
            made.append(event)
        elif isinstance(event, Undo):
            made = [earlier for earlier in made if earlier.id != event.id]
    return made


def _windows(made: Iterable[Rollback | GaveUp]) -> tuple[tuple[int, int], ...]:
    return merged(window for event in made for window in event.windows)


# ---- events that come in numbers ----


def _flurries(events: Iterable[Event]) -> list[list[Event]]:
    """Events in groups to be told as one: frequent ones of a kind, and of a series, that lie close to each other with
    nothing else in between but others such."""
    groups: list[list[Event]] = []
    open_: dict[tuple[str, str], list[Event]] = {}
    for event in events:
        if not isinstance(event, Frequent):
            open_ = {}
            groups.append([event])
            continue
        key = event.event, "" if isinstance(event, Drop) else event.series
        if key in open_ and 0 <= event.step - open_[key][-1].step <= FLURRY:
            open_[key].append(event)
        else:
            open_[key] = [event]
            groups.append(open_[key])
    return groups


def _line(group: Sequence[Event]) -> str:
    """An event, or several of a kind as one, with the time."""
    clock = _when(group[0])[1]
    if len(group) == 1:
        return f"{clock}{group[0].sentence()}"
    data = [event.data_step for event in group if event.data_step is not None]
    where = f"steps {_range(event.step for event in group)}" + (f" (data steps {_range(data)})" if data else "")
    return one_line(f"{clock}{where}: {_told_as_one(group)}")


def _told_as_one(group: Sequence[Event]) -> str:
    if drops := [event for event in group if isinstance(event, Drop)]:
        return (
            f"{drops[0].by} dropped {len(drops)} updates ({_counted(drop.rule for drop in drops)}), "
            f"loss {_range(drop.loss for drop in drops)}, gradient norm {_range(drop.grad_norm for drop in drops)}, "
            f"up to {max(drop.consecutive for drop in drops)} in a row, {drops[-1].total} recently"
        )
    if spikes := [event for event in group if isinstance(event, Spike)]:
        values, scores = ([getattr(event, name) for event in spikes] for name in ("value", "score"))
        highest = "not finite" if None in values else f"{max(values):.4g}"
        far = "" if None in scores else f", {max(scores):.4g} MADs above its level"
        return f"{len(spikes)} spikes of the {SERIES[spikes[0].series]}, the highest {highest}{far}"
    ends = [event for event in group if isinstance(event, SpikeEnd)]
    lengths = _range(event.duration for event in ends)
    return f"the {SERIES[ends[0].series]} came back to its level {len(ends)} times, after {lengths} steps"


def _range(values: Iterable[float | None]) -> str:
    """The least and the greatest."""
    values = list(values)
    finite = [value for value in values if value is not None]
    ends = (
        [f"{end:.4g}" if isinstance(end, float) else str(end) for end in (min(finite), max(finite))] if finite else []
    )
    text = " to ".join(dict.fromkeys(ends))
    return " and ".join(filter(None, [text, "not finite" if len(finite) < len(values) else ""]))


# ---- words ----


def _counted(names: Iterable[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(names).items())


def _with_reasons(reasons: Iterable[str]) -> str:
    """``"3 (2 spike, 1 non-finite loss)"``."""
    reasons = list(reasons)
    return f"{len(reasons)} ({_counted(reasons)})" if reasons else "0"


def _when(event: Event) -> tuple[str, str]:
    """Day, and ``"12:34:56 · "``, in UTC; a time that is none is told as it is."""
    if event.time is None:
        return UNDATED, ""
    try:
        at = datetime.fromisoformat(event.time.replace("Z", "+00:00")).astimezone(timezone.utc)
    except (AttributeError, TypeError, ValueError, OverflowError, OSError):  # of an unknown event, anything
        return UNDATED, f"{one_line(str(event.time))} · "
    return at.date().isoformat(), f"{at:%H:%M:%S} · "


def _markdown(text: str) -> str:
    """Text on one line that Markdown shows as it is."""
    return MARKUP.sub(lambda match: f"\\{match[0]}", one_line(text))
