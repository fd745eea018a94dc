"""The tables of a report: how each run stands, what happened to it, how it was configured. All are HTML."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from megatron_stable.analysis.flight import rows, standouts
from megatron_stable.analysis.report.run import Run
from megatron_stable.data.skip import merged
from megatron_stable.records.directory import SILENT
from megatron_stable.stability.event import one_line
from megatron_stable.stability.events import Drop, Event, GaveUp, Rollback

LISTED = 150  # events of a kind that are listed
FOREMOST = 12  # what stood out in a file of the flight recorder


def table(heads: Sequence[str], body: Iterable[Sequence[str]], name: str, numbers: bool = False) -> str:
    """A table of cells that are HTML already, in a box that scrolls if it is too wide."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    kind = ' class="number"' if numbers else ""
    lines = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td{kind}>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in body
    )
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(name)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def summary(runs: Sequence[Run]) -> str:
    """How the runs stand, one column each."""
    facts = [_facts(run) for run in runs]
    body = [(escape(name), *(escape(each[name]) for each in facts)) for name in facts[0]]
    return table(["fact", *(run.name for run in runs)], body, "Summary, table")


def _facts(run: Run) -> dict[str, str]:
    config, curves, newest = run.config, run.curves, run.curves.newest
    counts = Counter(event.event for event in run.events)
    acts = [event for event in run.events if isinstance(event, (Rollback, GaveUp))]
    skipped = merged(window for event in acts for window in event.windows)
    speed = curves.series.line("tokens_per_second").mean
    lowest, validation = curves.series.line("loss").least, curves.series.line("validation_loss").least
    model = config.model
    return {
        "step": f"{curves.step:,} of {config.run.steps:,}, recorded {run.written}",
        "model": f"{model.layers} layers, width {model.hidden}, {model.heads} heads, recipe {model.recipe}",
        "loss": f"{number(newest.get('loss'))} at the last step, {_lowest(lowest)} at its lowest",
        "validation loss": f"{number(newest['validation_loss'])} the last time, {_lowest(validation)} at its lowest"
        if "validation_loss" in newest
        else "not measured",
        "largest gradient norm": _largest(curves.series.line("grad_norm").most),
        "spikes": str(counts["spike"]),
        "rises and divergences": str(counts["rise"] + counts["divergence"]),
        "dropped updates": str(sum(isinstance(event, Drop) for event in run.events)),
        "warnings": str(counts["warning"]),
        "rollbacks": f"{counts['rollback']}" + (", and the run was given up" if counts["gave_up"] else ""),
        "data steps skipped": ", ".join(f"{first}–{last}" for first, last in skipped) or "none",
        "tokens": f"{newest['tokens']:,}" if isinstance(newest.get("tokens"), int) else "unknown",
        "tokens per second": f"{np.nanmedian(speed):,.0f} as a rule" if np.isfinite(speed).any() else "not measured",
    }


def number(value: Any) -> str:
    """A number in four digits."""
    return f"{value:.4g}" if isinstance(value, (int, float)) else "not finite"


def _lowest(values: np.ndarray) -> str:
    return f"{np.nanmin(values):.4g}" if np.isfinite(values).any() else "never finite"


def _largest(values: np.ndarray) -> str:
    return f"{np.nanmax(values):.4g}" if np.isfinite(values).any() else "not recorded"


def ledger(run: Run, prefix: str) -> str:
    """What happened, with a box to tick for each kind; the page's style hides the others without a script."""
    if not run.events:
        return '<p class="note">The ledger has no entry.</p>'
    kinds = [_kind(event) for event in run.events]
    counts, left = Counter(kinds), Counter[str]()
    numbers = {kind: i for i, kind in enumerate(counts)}
    ids = {kind: f"{prefix}-kind-{i}" for kind, i in numbers.items()}
    boxes = "".join(
        f'<label><input type="checkbox" checked id="{ids[kind]}"> {escape(kind)} ({count})</label>'
        for kind, count in counts.items()
    )
    hide = "".join(f"body:has(#{name}:not(:checked)) tr.{name}{{display:none}}" for name in ids.values())
    lines = []
    for event, kind in zip(reversed(run.events), reversed(kinds), strict=True):
        left[kind] += 1
        if left[kind] > LISTED:
            continue
        time = "" if event.time is None else one_line(str(event.time)).replace("+00:00", "").replace("T", " ")
        lines.append(
            f'<tr class="{ids[kind]}"><td class="number">{escape(time)}</td><td>{escape(kind)}</td>'
            f"<td>{escape(event.sentence())}</td></tr>"
        )
    more = {kind: count - LISTED for kind, count in counts.items() if count > LISTED}
    note = ", ".join(f"{count} more of {escape(kind)}" for kind, count in more.items())
    name = f"Ledger of {run.name}, table"
    return (
        f"<style>{hide}</style><fieldset><legend>Kinds of events</legend>{boxes}</fieldset>"
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(name)}"><table><thead><tr>'
        '<th scope="col">time (UTC)</th><th scope="col">kind</th><th scope="col">what happened, newest first</th></tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
        + (f'<p class="note">ledger.jsonl has {note}.</p>' if note else "")
    )


def _kind(event: Event) -> str:
    return one_line(str(event.event)).replace("_", " ")


def flight_recorder(run: Run) -> str:
    """What each file of the flight recorder holds, and what stood out in it."""
    if not run.flights:
        return '<p class="note">It has written nothing: the guard saw no trouble, or nothing was measured before.</p>'
    parts = []
    for flight in reversed(run.flights):
        name = f"flight/{flight.path.name}"
        found = standouts(rows(flight.path))[:FOREMOST]
        lines = "".join(f"<li>{escape(standout.words())}</li>" for standout in found)
        what = f"<p>What left its own level, the farthest first, with the layer that left it first:</p><ol>{lines}</ol>"
        parts.append(
            f"<details{' open' if flight is run.flights[-1] else ''}><summary>Steps {flight.first} to {flight.last} "
            f"(<code>{escape(name)}</code>)</summary>{what if found else '<p>Nothing left its own level.</p>'}"
            "</details>"
        )
    return "".join(parts)


def configuration(runs: Sequence[Run]) -> str:
    """Every field, by section; of several runs, first what differs."""
    fields = [run.config.by_key() for run in runs]
    heads = ["field", *(run.name for run in runs)]
    parts = []
    if len(runs) > 1:
        differing = [
            key
            for key in fields[0]
            if any(each[key] != fields[0][key] for each in fields[1:])
            and key.partition(".")[0] not in SILENT
            and key != "run.directory"
        ]
        body = [_row(key, fields) for key in differing]
        parts.append(
            table(heads, body, "What differs") if body else "<p>The runs do not differ but in their names.</p>"
        )
    everything = table(heads, [_row(key, fields) for key in fields[0]], "All fields")
    parts.append(f"<details><summary>All fields</summary>{everything}</details>")
    return "".join(parts)


def _row(key: str, fields: Sequence[dict[str, Any]]) -> list[str]:
    return [f"<code>{escape(key)}</code>", *(escape(json.dumps(each[key], ensure_ascii=False)) for each in fields)]
