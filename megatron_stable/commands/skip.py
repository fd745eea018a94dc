"""`megatron-stable skip`: roll back to before a spike and skip its data."""

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from megatron_stable.analysis.foreign import flags
from megatron_stable.analysis.lead import settings_for
from megatron_stable.analysis.series import Series, read_series
from megatron_stable.analysis.stopped_run import Changes, Seen, StoppedRun
from megatron_stable.config.schema import GuardConfig
from megatron_stable.data.skip import merged
from megatron_stable.errors import ConfigError
from megatron_stable.numbers import finite
from megatron_stable.stability.detector import Spike, find_spikes
from megatron_stable.stability.interventions import Intervention
from megatron_stable.stability.recovery import window

T = TypeVar("T")
Windows = list[tuple[int, int]]


def skip(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="The directory of a run that is not in progress.")
    ] = None,
    spike: Annotated[
        int | None,
        typer.Option(min=1, help="Number of the spike in the list; default: the last one not yet dealt with."),
    ] = None,
    from_step: Annotated[
        list[int] | None, typer.Option(min=1, help="First data step to skip, instead of choosing a spike; repeatable.")
    ] = None,
    to_step: Annotated[
        list[int] | None, typer.Option(min=1, help="Last data step to skip, inclusive; once for each --from-step.")
    ] = None,
    checkpoint: Annotated[
        int | None, typer.Option(min=0, help="Step of the checkpoint to roll back to; default: chosen for you.")
    ] = None,
    learning_rate_factor: Annotated[
        float | None, typer.Option(help="Multiply the learning rate by this from then on; above 0, at most 1.")
    ] = None,
    clip_factor: Annotated[
        float | None, typer.Option(help="Multiply optimizer.clip_grad by this from then on; above 0, at most 1.")
    ] = None,
    keep_loss_scale: Annotated[bool, typer.Option("--keep-loss-scale", help="Do not reset fp16's loss scale.")] = False,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Find spikes in this TensorBoard directory, of any trainer.")
    ] = None,
    tag: Annotated[
        str | None, typer.Option(help="Tag of the loss there, such as 'lm loss'; default: under its usual names.")
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Write the proposal into the run.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Undo the run's last intervention.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Roll back to a checkpoint before a loss spike and skip the data that caused it.

    Lists the spikes and proposes a checkpoint to roll back to, data to skip and other changes, with reasons. --apply
    writes the proposal into the run; the same `pretrain` command then resumes from that checkpoint and skips the data.

    A data step is a position in the order of the data: the step plus what has been skipped before it, in batches of
    the size that they have there; docs/data.md.

    Without RUN, for a run of another trainer such as Megatron-LM or OLMo-core, it prints what to tell that trainer.

    Example:
      megatron-stable skip runs/first
      megatron-stable skip runs/first --spike 2 --learning-rate-factor 0.7 --apply
      megatron-stable skip runs/first --from-step 40701 --to-step 40900 --apply
      megatron-stable skip runs/first --undo
      megatron-stable skip --tensorboard logs --tag "lm loss"
    """
    search = {"--spike": spike, "--tensorboard": tensorboard, "--tag": tag}
    changes = {
        "--checkpoint": checkpoint,
        "--learning-rate-factor": learning_rate_factor,
        "--clip-factor": clip_factor,
        "--keep-loss-scale": keep_loss_scale,
        "--apply": apply,
    }
    firsts, lasts = from_step or [], to_step or []
    if len(firsts) != len(lasts):
        raise ConfigError("--from-step and --to-step go together: give both for each window, inclusive")
    windows = list(zip(firsts, lasts, strict=True))
    if windows:
        _refuse(search, "--from-step and --to-step already say what to skip")
    if undo:
        named = {"--from-step": from_step or None}
        _refuse({**search, **changes, **named}, "--undo only undoes the last intervention")
    if run is None:
        _refuse({**changes, "--undo": undo}, "without RUN there is nothing to change")
        if tensorboard is None and not windows:
            raise ConfigError("give a RUN, or a --tensorboard directory to search")
        facts, lines = _advise(tensorboard, tag, spike, windows)
    elif undo:
        facts, lines = _undo(run)
    else:
        wanted = Changes(learning_rate_factor, clip_factor, not keep_loss_scale)
        stopped = StoppedRun(run)
        facts, lines, intervention = {"notes": [], "series": None, "spikes": []}, [], None
        if windows:
            intervention = stopped.without_data(windows, wanted, checkpoint)
        else:
            series, seen = stopped.spikes(tensorboard, tag)
            facts, lines = _listed(series, [each.spike for each in seen], seen)
            open_ = [each for each in seen if each.settled is None]
            if chosen := _chosen(seen, spike, open_):
                intervention = stopped.after_spike(chosen, wanted, checkpoint)
        more, said = _proposed(stopped, intervention, apply)
        facts, lines = {**facts, **more}, [*lines, *said]
    print(json.dumps(facts, indent=1, allow_nan=False) if as_json else "\n".join(lines).lstrip("\n"))


def _refuse(options: dict[str, Any], why: str) -> None:
    """ConfigError if one of these was given."""
    if given := [name for name, value in options.items() if value is not None and value is not False]:
        raise ConfigError(f"{why}: leave out {', '.join(given)}")


def _proposed(stopped: StoppedRun, intervention: Intervention | None, apply: bool) -> tuple[dict[str, Any], list[str]]:
    """A proposal in plain values and in lines; applied, if so wanted."""
    run, newest = stopped.directory.path, stopped.stands_at
    facts = {
        "proposal": intervention and intervention.model_dump(mode="json"),
        "applied": apply and intervention is not None,
    }
    if intervention is None:
        lines = ["Nothing to skip. To skip data anyway, name it with --from-step and --to-step."]
        lines += _go_on(stopped) if stopped.done.items else []
        return {**facts, "abandoned": [], "command": stopped.command()}, lines
    what, *why = intervention.reason.split("; ")
    again = newest - intervention.rollback_to
    lines = [
        "",
        f"Proposal, for the {what}:" if intervention.rule != "named by the user" else "Proposal:",
        f"  roll back to the checkpoint of step {intervention.rollback_to}; {again} steps are trained again"
        if again
        else f"  resume from the newest checkpoint, of step {newest}",
        f"  skip data steps {_spans(intervention.windows)}",
        f"  learning rate x {intervention.learning_rate_factor:g}, optimizer.clip_grad x {intervention.clip_factor:g}"
        + (", loss scale reset" if intervention.reset_loss_scale else ""),
        "Reasons:",
        *(f"  {reason}" for reason in why),
        "",
    ]
    abandoned: list[int] = []
    if apply:
        abandoned = stopped.apply(intervention)
        lines += [f"Written into {run}. To undo it: megatron-stable skip {shlex.quote(str(run))} --undo"]
        lines += _abandoned(abandoned, "deleted once the run has passed them")
        lines += _go_on(stopped)
    else:
        lines += ["Nothing has been changed yet: the same command with --apply writes this into the run."]
    return {**facts, "abandoned": abandoned, "command": stopped.command()}, lines


def _undo(run: Path) -> tuple[dict[str, Any], list[str]]:
    stopped = StoppedRun(run)
    last, abandoned = stopped.undo()
    lines = [
        f"Undid what the {last.by} did at {last.time}: rollback to step {last.rollback_to}"
        + (f", data steps {_spans(last.windows)} skipped" if last.windows else "")
        + f" ({last.reason})",
        f"The run is at step {stopped.stands_at}.",
        *_abandoned(abandoned, "trained with what was undone"),
        *_go_on(stopped),
    ]
    facts = {"undone": last.model_dump(mode="json"), "stands_at": stopped.stands_at, "abandoned": abandoned}
    return {**facts, "command": stopped.command()}, lines


def _abandoned(steps: list[int], why: str) -> list[str]:
    return [f"Checkpoints that are no longer resumed from: {', '.join(map(str, steps))} ({why})"] if steps else []


def _go_on(stopped: StoppedRun) -> list[str]:
    return ["Resume the run as it was started, such as with:", f"  {shlex.join(stopped.command())}"]


def _advise(
    tensorboard: Path | None, tag: str | None, spike: int | None, windows: Windows
) -> tuple[dict[str, Any], list[str]]:
    """What to tell another trainer."""
    facts: dict[str, Any] = {"notes": [], "series": None, "spikes": []}
    lines: list[str] = []
    if tensorboard is not None:
        series = read_series(tensorboard, tag)
        found = find_spikes(series.steps.tolist(), series.values.tolist(), settings_for(series.name))
        facts, lines = _listed(series, found)
        one = _chosen(found, spike, found)
        if one is None:
            return {**facts, "windows": [], "rollback_to": None, "trainers": []}, [*lines, "Nothing to skip."]
        usual = GuardConfig()
        rollback_to = max(one.onset - usual.rollback_steps, 0)
        windows = [window(rollback_to, one.onset, one.onset + one.duration - 1, usual.skip_steps)]
    else:
        windows = list(merged(windows))
        rollback_to = windows[0][0] - 1
    lines += [
        "",
        f"Roll back to a checkpoint at or shortly before step {rollback_to}, and skip steps {_spans(windows)}:",
    ]
    known = flags(windows, rollback_to)
    for entry in known:
        lines += [f"  {entry.trainer}: {entry.text}", *([f"    {entry.note}"] if entry.note else [])]
    facts |= {"windows": windows, "rollback_to": rollback_to, "trainers": [entry._asdict() for entry in known]}
    return facts, lines


def _listed(
    series: Series, found: Sequence[Spike], seen: Sequence[Seen] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Spikes in plain values, and the lines that list them; ``seen``: the same, where they lie in a run's data."""
    count = {0: "no spikes", 1: "1 event"}.get(len(found), f"{len(found)} events")
    span = f"steps {series.steps[0]} to {series.steps[-1]}"
    lines = [*series.notes, f"{count} in {len(series.steps):,} points of {series.name!r}, {span}"]
    facts: list[dict[str, Any]] = []
    for i, s in enumerate(found):
        facts.append({**vars(s), "level": finite(s.level), "score": finite(s.score)})
        line = f"  {i + 1}. {s.kind}, steps {s.onset}-{s.onset + s.duration - 1}"
        if seen is not None:
            facts[-1] |= {"data_steps": seen[i].data_steps, "settled": seen[i].settled}
            line += f" (data steps {_spans([seen[i].data_steps])})"
        peak = "not finite" if s.peak is None else f"{s.peak:.4g}"
        line += f": from {s.level:.4g} to {peak} at step {s.peak_step}"
        lines.append(line + (f"; {seen[i].settled}" if seen is not None and seen[i].settled else ""))
    return {"notes": list(series.notes), "series": series.name, "spikes": facts}, lines


def _chosen(found: Sequence[T], number: int | None, open_: Sequence[T]) -> T | None:
    """The one of this number, from 1, or the last of those that are open, if any."""
    if number is None:
        return open_[-1] if open_ else None
    if number > len(found):
        raise ConfigError(f"--spike {number}: there are only {len(found)}; without it the last one is taken")
    return found[number - 1]


def _spans(windows: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{first}-{last}" for first, last in windows)
