"""The page of a sweep: what came out of it in tables, figures, and every run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

from megatron_stable.analysis.report.frame import Section, frame, notes, show
from megatron_stable.analysis.report.tables import table
from megatron_stable.config.schema import Config
from megatron_stable.study.criteria import HOLDS, LACK, OTHERS, RISE
from megatron_stable.study.figures import figures
from megatron_stable.study.panels import short
from megatron_stable.study.reading import Sweep
from megatron_stable.study.sensitivity import (
    CONFIDENCE,
    EVEN,
    FEWEST,
    Estimate,
    Largest,
    best,
    largest_stable,
    robustness,
    sensitivity,
    unevenness,
    verdicts_of,
)
from megatron_stable.study.table import RATE, SEED, STATUS

RUNS = (
    "status", "parameters", "initial_loss", "lowest_loss", "loss", "score", "rise", "diverged_at", "spikes",
    "dropped_updates", "warnings", "first_warning",
)  # fmt: skip
UNKNOWN = "–"
KEYS = Config().by_key().keys()


def render(sweep: Sweep) -> str:
    """The report of a sweep."""
    return frame(sweep.name, _sections(sweep), "docs/sensitivity.md")


def _sections(sweep: Sweep) -> Iterator[Section]:
    drawn = "".join(show(each) for each in figures(sweep))
    found = [largest_stable(group) for group in sweep.groups]
    yield Section("summary", "Summary", _facts(sweep) + notes(_remarks(sweep, found)))
    yield Section("groups", "Groups", _groups(sweep, found))
    yield Section("figures", "Figures", drawn or "<p>No loss is known yet.</p>")
    yield Section("stable", "Stable runs at each learning rate", _stable(sweep))
    yield Section("criterion", "What hangs on the criterion", _criteria(sweep))
    yield Section("lost", "Runs without a result", _lost(sweep))
    yield Section("runs", "Runs", _runs(sweep))
    yield Section("configuration", "Configuration", _shared(sweep))


def _facts(sweep: Sweep) -> str:
    counts = Counter(row["status"] for row in sweep.rows)
    facts = {
        "runs": ", ".join(
            [f"{len(sweep.rows):,}", *(f"{counts[status]:,} {status}" for status in STATUS if counts[status])]
        ),
        "learning rates": ", ".join(map(short, sweep.rates)),
        "seeds": f"{len({row.get(SEED) for row in sweep.rows}):,}",
    }
    for axis in sweep.groups[0].values:
        facts[axis] = ", ".join(dict.fromkeys(_cell(row.get(axis)) for row in sweep.rows))
    return table(["fact", sweep.name], [(escape(name), escape(text)) for name, text in facts.items()], "Summary, table")


def _remarks(sweep: Sweep, found: Sequence[Largest]) -> Iterator[str]:
    """What a reader should know of the grid."""
    waiting = sum(row["status"] == "unfinished" for row in sweep.rows)
    if waiting:
        yield f"The sweep is in progress: {waiting:,} of {len(sweep.rows):,} runs have not ended"
    if len(sweep.rates) < 2:
        yield "There is one learning rate: LR sensitivity needs several"
    if unevenness(sweep.rates) > EVEN:
        yield (
            f"The learning rates are not even in their logarithm: the widest step is {unevenness(sweep.rates):.1f} "
            "times the narrowest. LR sensitivity is their plain mean, in which crowded learning rates count for more"
        )
    if len({row.get(SEED) for row in sweep.rows}) < FEWEST:
        yield f"Intervals need {FEWEST} seeds or more"
    curves = [group.name for group, each in zip(sweep.groups, found, strict=True) if not each.monotone]
    if curves:
        yield f"Stable again above a learning rate that diverged: {', '.join(curves)}"


def _groups(sweep: Sweep, found: Sequence[Largest]) -> str:
    heads = [
        "group", "parameters", "seeds", "best loss", "at learning rate", "LR sensitivity",
        "largest stable learning rate", "first diverged at",
    ]  # fmt: skip
    body = []
    for group, largest in zip(sweep.groups, found, strict=True):
        least = best(group)
        first = UNKNOWN if largest.first is None else short(sweep.rates[largest.first])
        body.append(
            [
                group.name,
                _cell(group.parameters),
                str(len(group.curves)),
                _cell(least and least.loss),
                UNKNOWN if least is None else short(least.rate),
                in_words(sensitivity(group)),
                largest_in_words(largest, sweep.rates),
                first,
            ]
        )
    lead = (
        f"Losses in nats per token. LR sensitivity: mean over all {len(sweep.rates)} learning rates of min(loss, "
        "initial loss), less the least of them. A run diverged if it could not go on, had lost again "
        f"{RISE:.0%} of what it had learnt, or lacks {LACK:.0%} of what its group learns at the best learning rate. "
        "The largest stable learning rate is the one up to which at least half of the seeds did not. In brackets: "
        f"{CONFIDENCE:.0%} intervals, bootstrap over seeds. ≥: runs are missing, or the grid ends first."
    )
    return f'<p class="note">{escape(lead)}</p>' + _table(heads, body, "Groups, table")


def in_words(estimate: Estimate) -> str:
    """An LR sensitivity: ``0.262 [0.21, 0.3]``, or ``≥ 0.2 (1 run missing)``."""
    if estimate.value is None:
        return UNKNOWN
    if estimate.missing:
        return f"≥ {estimate.value:.3g} ({estimate.missing} run{'s' * (estimate.missing > 1)} missing)"
    interval = "" if estimate.interval is None else " [{:.3g}, {:.3g}]".format(*estimate.interval)
    return f"{estimate.value:.3g}{interval}"


def largest_in_words(largest: Largest, rates: Sequence[float]) -> str:
    """A largest stable learning rate: ``0.03 [0.01, 0.03]``, ``≥ 0.3``, or ``< 3e-4``."""
    interval = largest.interval and f" [{_place(largest.interval[0], rates)}, {_place(largest.interval[1], rates)}]"
    return f"{_span(largest.place, rates)}{interval or ''}"


def _span(place: Sequence[int], rates: Sequence[float]) -> str:
    """Where a largest stable learning rate is, given the least and the greatest place that it may have."""
    low, high = place
    if low == high:
        return _place(low, rates)
    if low >= 0:
        return f"≥ {short(rates[low])}"
    return UNKNOWN if high == len(rates) else f"≤ {short(rates[high])}"


def _place(place: int, rates: Sequence[float]) -> str:
    if place < 0:
        return f"< {short(rates[0])}"
    return short(rates[place]) if place < len(rates) else f"> {short(rates[-1])}"


def _stable(sweep: Sweep) -> str:
    body = []
    for group in sweep.groups:
        cells = []
        for verdicts in zip(*verdicts_of(group), strict=True):
            known = len(verdicts) - verdicts.count(None)
            cells.append(f"{verdicts.count(False)} of {known}" if known else UNKNOWN)
        body.append([group.name, *cells])
    return _table(["group", *map(short, sweep.rates)], body, "Stable runs at each learning rate, table")


def _criteria(sweep: Sweep) -> str:
    """The largest stable learning rates by other criteria, and whether the order of groups changes."""
    found = [robustness(sweep.groups, criterion) for criterion in (HOLDS, *OTHERS)]
    body = [
        [group.name, *(_span(each.places[i], sweep.rates) for each in found)] for i, group in enumerate(sweep.groups)
    ]
    pairs = [
        ["pairs in the other order", *(f"{each.reversed} of {each.apart}" for each in found)],
        ["pairs no longer told apart", *(f"{each.alike} of {each.apart}" for each in found)],
    ]
    lead = (
        "Largest stable learning rates by other criteria. The last rows: of the pairs of groups that this page tells "
        "apart, how many another criterion puts in the other order, and how many it does not tell apart."
    )
    heads = ["group", *(each.criterion.name for each in found)]
    return f'<p class="note">{escape(lead)}</p>' + _table(heads, body + pairs, "What hangs on the criterion, table")


def _lost(sweep: Sweep) -> str:
    rows = [row for row in sweep.rows if row["status"] == "failed"]
    if not rows:
        return "<p>No run failed.</p>"
    body = [[str(row["name"]), str(row.get("reason") or "no reason is known")] for row in rows]
    return _table(["run", "why it failed"], body, "Runs without a result, table", numbers=False)


def _runs(sweep: Sweep) -> str:
    varied = [*sweep.groups[0].values, RATE, SEED]
    columns = [column for column in (*varied, *RUNS) if any(row.get(column) is not None for row in sweep.rows)]
    body = [[str(row["name"]), *(_cell(row.get(column)) for column in columns)] for row in sweep.rows]
    shown = _table(["run", *columns], body, "Runs, table")
    return f"<details><summary>All {len(sweep.rows):,} runs</summary>{shown}</details>"


def _shared(sweep: Sweep) -> str:
    fields = {key: {json.dumps(row.get(key)) for row in sweep.rows} for key in sweep.rows[0] if key in KEYS}
    body = [[key, *values] for key, values in fields.items() if len(values) == 1]
    shown = _table(["field", "value"], body, "What all runs share, table", numbers=False)
    return f"<details><summary>What all runs share</summary>{shown}</details>"


def _table(heads: Sequence[str], body: Iterable[Sequence[str]], name: str, numbers: bool = True) -> str:
    return table(heads, [[*map(escape, cells)] for cells in body], name, numbers)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return UNKNOWN if value is None else str(value)
