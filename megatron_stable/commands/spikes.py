"""`megatron-stable spikes`: where a run's loss left its course, and whether the gradient norm told so before."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from megatron_stable.analysis.figure import Event, draw
from megatron_stable.analysis.lead import lead, settings_for
from megatron_stable.analysis.series import Series, is_gradient_norm, read_gradient_norm, read_series
from megatron_stable.config.load import load_config
from megatron_stable.numbers import finite
from megatron_stable.records.directory import RunDirectory
from megatron_stable.stability.detector import Spike, find_spikes

DECIDES = (  # the data or the state of the model
    "for a run of ours, `megatron-stable inspect RUN --step N --checkpoint A` says whether the data or the "
    "state changed; for another trainer, evaluate batches from before the onset again"
)


def spikes(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run's directory, or a TensorBoard directory of any trainer.")
    ],
    tag: Annotated[
        str | None, typer.Option(help="The series to search; default: the training loss, under its usual names.")
    ] = None,
    grad_norm_tag: Annotated[
        str | None, typer.Option(help="The gradient norm; default: under its usual names, if it is there.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw both, with the spikes marked.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Find the spikes of a run: where each began, its peak, how long it lasted, and whether the gradient norm led it.

    A spike falls back. A rise stays, as after a change of data or damage to the model: from a curve alone nobody can
    tell which. A divergence goes on rising, or is higher than a change of data explains, or is not finite. A run of
    ours is searched with its guard's settings. Where a run went back to an earlier step, what it had written from there
    on is not looked at.

    Example:
      megatron-stable spikes runs/first
      megatron-stable spikes other/tensorboard --tag "lm loss" --figure spikes.png
    """
    series = read_series(directory, tag)
    run = RunDirectory(directory)
    guard = load_config(run.config).guard if run.metrics.is_file() and run.config.is_file() else None
    found = find_spikes(series.steps.tolist(), series.values.tolist(), settings_for(series.name, guard))
    wanted = grad_norm_tag is not None or ((found or figure is not None) and not is_gradient_norm(series.name))
    norm = read_gradient_norm(directory, grad_norm_tag) if wanted else None
    notes = dict.fromkeys([*series.notes, *(norm.notes if norm is not None else ())])  # each once
    if wanted and norm is None:
        notes["no gradient norm was found; if there is one, name it with --grad-norm-tag"] = None
    facts = [_facts(spike, series) | {"gradient_norm_lead": norm and lead(spike, norm)} for spike in found]
    if figure is not None:
        _draw(figure, series, norm, found)
    if as_json:
        whole = {
            "directory": str(directory),
            "series": series.name,
            "gradient_norm": norm and norm.name,
            "points": len(series.steps),
            "steps": [int(series.steps[0]), int(series.steps[-1])],
            "notes": list(notes),
            "spikes": facts,
        }
        print(json.dumps(whole, indent=1, allow_nan=False))
        return
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    count = "no spikes" if not found else "1 event" if len(found) == 1 else f"{len(found)} events"
    print(f"{count} in {len(series.steps):,} points of {series.name!r}, steps {series.steps[0]} to {series.steps[-1]}")
    if found:
        _print_table(facts, series.data_steps is not None, norm is not None)
    if any(spike.kind == "rise" for spike in found):
        print(f"What would decide why a rise stayed: {DECIDES}.")


def _facts(spike: Spike, series: Series) -> dict[str, Any]:
    last = spike.onset + spike.duration - 1
    return {
        "kind": spike.kind,
        "onset": spike.onset,
        "peak": spike.peak,
        "peak_step": spike.peak_step,
        "duration": spike.duration,
        "level": finite(spike.level),
        "score": finite(spike.score),
        "decides": DECIDES if spike.kind == "rise" else None,
        "data_steps": [series.data_step(spike.onset), series.data_step(last)]
        if series.data_steps is not None
        else None,
    }


def _print_table(facts: list[dict[str, Any]], data_steps: bool, norm: bool) -> None:
    columns = ["onset", "kind", "peak", "at step", "duration", "level before", "score"]
    table = Table(*columns, *["gradient norm"] * norm, *["data steps"] * data_steps)
    for fact in facts:
        numbers = ["not finite" if fact[key] is None else f"{fact[key]:.4g}" for key in ("peak", "level", "score")]
        cells = [str(fact["onset"]), str(fact["kind"]), numbers[0], str(fact["peak_step"]), str(fact["duration"])]
        cells += numbers[1:]
        if norm:
            cells.append(_led(fact["gradient_norm_lead"]))
        if data_steps:
            cells.append("-".join(map(str, fact["data_steps"])))
        table.add_row(*cells)
    Console().print(table)


def _led(ahead: int | None) -> str:
    if ahead is None:
        return "did not rise"
    return f"led by {ahead}" if ahead > 0 else f"followed by {-ahead}" if ahead else "at the same step"


def _draw(figure: Path, series: Series, norm: Series | None, found: list[Spike]) -> None:
    records: dict[int, dict[str, float]] = {}
    for key, each in (("loss", series), ("grad_norm", norm)):
        for step, value in zip(each.steps.tolist(), each.values.tolist(), strict=True) if each is not None else ():
            records.setdefault(step, {"step": step})[key] = value
    events = [Event(spike.onset, spike.onset + spike.duration - 1, spike.kind) for spike in found]
    labels = series.name, "gradient norm" if norm is None else norm.name
    draw({series.name: [records[step] for step in sorted(records)]}, figure, events=events, labels=labels)
