"""The page of a report: HTML that needs no other file, no script and no network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from html import escape

from megatron_stable.analysis.drawing import svg
from megatron_stable.analysis.report.figures import Drawn, figures
from megatron_stable.analysis.report.inline import inline
from megatron_stable.analysis.report.marks import LEGEND
from megatron_stable.analysis.report.reading import where
from megatron_stable.analysis.report.run import Run
from megatron_stable.analysis.report.style import CSS
from megatron_stable.analysis.report.tables import configuration, flight_recorder, ledger, summary
from megatron_stable.persisted import package_version

ICON = '<link rel="icon" href="data:,">'  # else a browser asks the server for one
GROUPS = {
    "outputs": "Outputs of layers", "attention": "Attention", "logits": "Output logits", "weights": "Weights",
    "gradients": "Gradients", "updates": "Updates", "moments": "Adam's second moments", "noise": "Gradient noise",
}  # fmt: skip


def render(runs: Sequence[Run], head: str = "") -> str:
    """The report of one or more runs.

    Args:
        head: What else goes into the page's head.
    """
    name = ", ".join(run.name for run in runs)
    sections = list(_sections(runs))
    contents = "".join(f'<li><a href="#{anchor}">{escape(title)}</a></li>' for anchor, title, _ in sections)
    body = "".join(
        f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{escape(title)}</h2>{content}</section>'
        for anchor, title, content in sections
    )
    now = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="megatron-stable {escape(package_version())}">
<title>{escape(name)} · report</title>
{ICON}
<style>{CSS}</style>
{head}</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<header><h1>{escape(name)}</h1><p class="note">Made {now} by <code>megatron-stable report</code>.
docs/diagnostics.md says how to read each figure.</p></header>
<div class="layout">
<nav aria-label="Contents"><ol>{contents}</ol></nav>
<main id="content" tabindex="-1">
{body}
</main>
</div>
</body>
</html>
"""


def _sections(runs: Sequence[Run]) -> Iterator[tuple[str, str, str]]:
    """Anchor, title and content of each section."""
    yield "summary", "Summary", summary(runs) + _notes(runs)
    groups: dict[str | None, list[str]] = {}
    for drawn in figures(runs):
        of_group = groups.setdefault(drawn.group, [])
        of_group.append(_figure(drawn, folded=drawn.group is not None and bool(of_group)))
    legend = f'<p class="note">Marks: {escape(LEGEND)}.</p>' if any(run.events for run in runs) else ""
    yield "training", "Training", legend + "".join(groups.pop(None, []))
    for group, shown in groups.items():
        assert group is not None
        yield group, GROUPS.get(group, group.replace("_", " ").capitalize()), "".join(shown)
    for number, run in enumerate(runs):
        several = f" of {run.name}" if len(runs) > 1 else ""
        yield f"flight-{number}", f"Flight recorder{several}", flight_recorder(run)
        yield f"ledger-{number}", f"Ledger{several}", ledger(run, f"ledger-{number}")
    yield "configuration", "Configuration", configuration(runs)


def _figure(drawn: Drawn, folded: bool) -> str:
    chart = drawn.chart
    picture = inline(svg(drawn.picture), chart.name, f"{chart.title}. {chart.caption}")
    shown = (
        f'<figure><div class="wide" role="region" tabindex="0" aria-label="{escape(chart.title)}, figure">{picture}'
        f"</div><figcaption>{escape(chart.caption)}</figcaption></figure>"
    )
    heading = f"<h3>{escape(chart.title)}</h3>"
    return f"<details><summary>{heading}</summary>{shown}</details>" if folded else f"{heading}{shown}"


def _notes(runs: Sequence[Run]) -> str:
    """What a reader should know about how the runs were read."""
    notes = []
    for run in runs:
        curves = run.curves
        if curves.series.width > 1:
            notes.append(
                f"{run.name}: charts show stretches of {curves.series.width} steps; bands reach from the least to the "
                "greatest value in each"
            )
        if curves.broken:
            notes.append(f"{run.name}: {curves.broken} lines of metrics.jsonl are no whole records and were left out")
        if curves.superseded.last:
            notes.append(f"{run.name}: grey lines are steps that the run went back behind and trained again")
        if not any(where(key) for key in curves.series.keys):
            notes.append(f"{run.name}: nothing inside the model was measured (logging.probes_every)")
    return f'<ul class="note">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>' if notes else ""
