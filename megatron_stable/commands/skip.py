"""`megatron-stable skip`: go back before a spike and skip its data."""

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer


def skip(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="The directory of a run that is not in progress.")
    ] = None,
    spike: Annotated[
        int | None, typer.Option(min=1, help="Which of the spikes that are listed; the last one if not given.")
    ] = None,
    from_step: Annotated[
        list[int] | None, typer.Option(min=1, help="First data step to skip, in place of a spike; may be repeated.")
    ] = None,
    to_step: Annotated[
        list[int] | None, typer.Option(min=1, help="Last data step to skip, inclusive; once for each --from-step.")
    ] = None,
    checkpoint: Annotated[
        int | None, typer.Option(min=0, help="The step of the checkpoint to go back to; chosen if not given.")
    ] = None,
    learning_rate_factor: Annotated[
        float | None, typer.Option(help="Multiply the learning rate by this from there on.")
    ] = None,
    clip_factor: Annotated[float | None, typer.Option(help="Multiply optimizer.clip_grad by this from there on.")] = None,
    keep_loss_scale: Annotated[bool, typer.Option("--keep-loss-scale", help="Do not reset fp16's loss scale.")] = False,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Find spikes in the TensorBoard directory of any trainer instead.")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="The loss there, such as 'lm loss'; guessed if not given.")] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Write the proposal into the run.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Take the run's last intervention back.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Go back to a checkpoint before a loss spike and skip the data that caused it.

    Lists the spikes, and proposes a checkpoint, a window of data steps and changes, with reasons. With --apply they
    are written into the run, and the same `pretrain` command goes on from that checkpoint with the window skipped.
    For runs of other trainers, it prints what to tell them.

    \b
    Example:
      megatron-stable skip runs/first
      megatron-stable skip runs/first --spike 2 --learning-rate-factor 0.7 --apply
      megatron-stable skip runs/first --from-step 40701 --to-step 40900 --apply
      megatron-stable skip runs/first --undo
      megatron-stable skip --tensorboard logs --tag "lm loss"
    """
    from megatron_stable.errors import ConfigError
    from megatron_stable.training.repair import Changes, StoppedRun

    windows = list(zip(from_step or [], to_step or [], strict=False))
    if len(from_step or []) != len(to_step or []):
        raise ConfigError("--from-step and --to-step go together: give each window both, inclusive")
    if run is None:
        if tensorboard is None and not windows:
            raise ConfigError("name the RUN to repair, or a --tensorboard directory to look at")
        if apply or undo:
            raise ConfigError("--apply and --undo need the RUN to write into; another trainer has to be told by hand")
        _advise(tensorboard, tag, spike, windows, as_json)
        return
    stopped = StoppedRun(run)
    go_on = f"go on with: {shlex.join(stopped.command())}"
    if undo:
        last = stopped.undo()
        said = f"took back the rollback to step {last.rollback_to} of {last.time}: {last.reason}"
        _show(as_json, {"undone": last.model_dump(mode="json"), "command": stopped.command()}, [said, go_on])
        return
    changes = Changes(learning_rate_factor, clip_factor, not keep_loss_scale)
    found, lines = ([], []) if windows else _spikes(tensorboard or run, tag)
    if not (found or windows):
        _show(as_json, {"spikes": [], "proposal": None, "applied": False}, [*lines, "Nothing to skip."])
        return
    if windows:
        repair = stopped.without_data(windows, changes, checkpoint)
    else:
        repair = stopped.after_spike(_chosen(found, spike), changes, checkpoint)
    lines += [
        "",
        f"Go back to the checkpoint of step {repair.rollback_to} ({repair.reason})",
        "Skip data steps " + ", ".join(f"{first}-{last}" for first, last in repair.windows),
        f"Learning rate x {repair.learning_rate_factor:g}, clip_grad x {repair.clip_factor:g}"
        + (", loss scale reset" if repair.reset_loss_scale else ""),
        "",
    ]
    if apply:
        stopped.apply(repair)
        lines += [f"Written into {run}; take it back with: megatron-stable skip {shlex.quote(str(run))} --undo", go_on]
    else:
        lines += ["Nothing is changed yet: give --apply as well to write this into the run."]
    facts = {"spikes": [vars(s) for s in found], "proposal": repair.model_dump(mode="json"), "applied": apply}
    _show(as_json, {**facts, "command": stopped.command()}, lines)


def _advise(
    tensorboard: Path | None, tag: str | None, spike: int | None, windows: list[tuple[int, int]], as_json: bool
) -> None:
    """What to tell another trainer."""
    from megatron_stable.config.schema import GuardConfig
    from megatron_stable.stability.foreign import flags
    from megatron_stable.stability.recovery import window

    usual = GuardConfig()
    found, lines = _spikes(tensorboard, tag) if tensorboard is not None and not windows else ([], [])
    if found:
        one = _chosen(found, spike)
        rollback_to = max(one.onset - usual.rollback_steps, 0)
        windows = [window(rollback_to, one.onset, one.onset + one.duration - 1, usual.skip_steps)]
    elif windows:
        rollback_to = min(first for first, _ in windows) - 1
    else:
        _show(as_json, {"spikes": [], "windows": [], "trainers": []}, [*lines, "Nothing to skip."])
        return
    said = ", ".join(f"{first}-{last}" for first, last in windows)
    lines += ["", f"Go back to a checkpoint of step {rollback_to} or somewhat before, and skip steps {said}:"]
    known = flags(windows, rollback_to)
    for entry in known:
        lines += [f"  {entry.trainer}: {entry.text}", *([f"    {entry.note}"] if entry.note else [])]
    facts = {"spikes": [vars(s) for s in found], "windows": windows, "rollback_to": rollback_to}
    _show(as_json, {**facts, "trainers": [entry._asdict() for entry in known]}, lines)


def _spikes(source: Path, tag: str | None) -> tuple[list[Any], list[str]]:
    """The spikes and divergences of a loss, and the lines that list them."""
    from megatron_stable.stability.detector import LOSS, find_spikes
    from megatron_stable.stability.series import read_series

    series = read_series(source, tag)
    found = [s for s in find_spikes(series.steps.tolist(), series.values.tolist(), LOSS) if s.kind != "shift"]
    lines = [*series.notes, f"{series.name}: {len(series.steps)} steps, {len(found)} spike(s)"]
    for number, s in enumerate(found, 1):
        peak = "not finite" if s.peak is None else f"{s.peak:.4g} at step {s.peak_step}"
        lines.append(f"  {number}. {s.kind} at step {s.onset}, {s.duration} steps long: {s.level:.4g} -> {peak}")
    return found, lines


def _chosen(found: list[Any], number: int | None) -> Any:
    from megatron_stable.errors import ConfigError

    if number is not None and number > len(found):
        raise ConfigError(f"--spike {number}: {len(found)} were found")
    return found[(number or len(found)) - 1]


def _show(as_json: bool, facts: dict[str, Any], lines: list[str]) -> None:
    print(json.dumps(facts, indent=1) if as_json else "\n".join(lines))
