"""The page of one or more runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from megatron_stable.analysis.report.figures import figures
from megatron_stable.analysis.report.frame import Section, frame, notes, show
from megatron_stable.analysis.report.marks import LEGEND
from megatron_stable.analysis.report.reading import where
from megatron_stable.analysis.report.run import Run
from megatron_stable.analysis.report.tables import configuration, flight_recorder, ledger, summary

GROUPS = {
    "outputs": "Outputs of layers", "attention": "Attention", "logits": "Output logits", "weights": "Weights",
    "gradients": "Gradients", "updates": "Updates", "moments": "Adam's second moments", "noise": "Gradient noise",
}  # fmt: skip


def render(runs: Sequence[Run], head: str = "") -> str:
    """The report of one or more runs.

    Args:
        head: What else goes into the page's head.
    """
    return frame(", ".join(run.name for run in runs), _sections(runs), "docs/diagnostics.md", head)


def _sections(runs: Sequence[Run]) -> Iterator[Section]:
    yield Section("summary", "Summary", summary(runs) + notes(_notes(runs)))
    groups: dict[str | None, list[str]] = {}
    for drawn in figures(runs):
        of_group = groups.setdefault(drawn.group, [])
        of_group.append(show(drawn, folded=drawn.group is not None and bool(of_group)))
    legend = f'<p class="note">Marks: {escape(LEGEND)}.</p>' if any(run.events for run in runs) else ""
    yield Section("training", "Training", legend + "".join(groups.pop(None, [])))
    for group, shown in groups.items():
        assert group is not None
        yield Section(group, GROUPS.get(group, group.replace("_", " ").capitalize()), "".join(shown))
    for number, run in enumerate(runs):
        several = f" of {run.name}" if len(runs) > 1 else ""
        yield Section(f"flight-{number}", f"Flight recorder{several}", flight_recorder(run))
        yield Section(f"ledger-{number}", f"Ledger{several}", ledger(run, f"ledger-{number}"))
    yield Section("configuration", "Configuration", configuration(runs))


def _notes(runs: Sequence[Run]) -> Iterator[str]:
    """How the runs were read."""
    for run in runs:
        curves = run.curves
        if curves.series.width > 1:
            yield (
                f"{run.name}: charts show stretches of {curves.series.width} steps; bands reach from the least to the "
                "greatest value in each"
            )
        if curves.broken:
            yield f"{run.name}: {curves.broken} lines of metrics.jsonl are no whole records and were left out"
        if curves.superseded.last:
            yield f"{run.name}: grey lines are steps that the run went back behind and trained again"
        if not any(where(key) for key in curves.series.keys):
            yield f"{run.name}: nothing inside the model was measured (logging.probes_every)"
