"""`megatron-stable surgery`: a checkpoint of another model that computes nearly the same, optimizer state included."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from megatron_stable.analysis.position import stages_of
from megatron_stable.checkpoint.catalog import newest_whole
from megatron_stable.checkpoint.format import MANIFEST, directory_name, stored_config
from megatron_stable.checkpoint.store import COMPLETE, point_latest
from megatron_stable.config.load import amended
from megatron_stable.config.surgery import changes
from megatron_stable.errors import ConfigError
from megatron_stable.files import appearing, explain_os_errors
from megatron_stable.records.directory import RunDirectory
from megatron_stable.stability.event import plain
from megatron_stable.stability.events import Surgery
from megatron_stable.surgery.operating import Operated, perform, planned, samples
from megatron_stable.surgery.report import facts, write_report


def surgery(
    source: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="The run's directory, or a checkpoint's.")],
    overrides: Annotated[
        list[str], typer.Argument(metavar="KEY=VALUE...", help="What becomes of the configuration, by dotted key.")
    ],
    output: Annotated[Path, typer.Option(help="The new run's directory.")],
    step: Annotated[int | None, typer.Option(help="The checkpoint; default: the newest complete one.")] = None,
    rewarm: Annotated[
        int | None,
        typer.Option(min=0, help="Steps in which the learning rate rises again from 0; default: the run's warm-up."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="PREFIX", help="What to look at; default: validation data, else training data to come."),
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="How much of it; default: 16,384 tokens, 4 sequences at least.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Operate on a checkpoint: add or remove norms, caps and LayerScale, untie, grow vocabulary, length or depth.

    The model is another afterwards, and computes the same as far as that is possible: new norms get the gains with
    which they change least on data that the model is shown, what is removed goes into the weights beside it, stacked
    blocks begin silent. The optimizer's state comes along. Loss and layers are compared on the same tokens before and
    after. `pretrain` goes on from the new run, whose learning rate rises again from 0.

    It runs without a GPU and holds a layer of each model, and of what is written a stretch, in memory at a time.

    Example:
      megatron-stable surgery runs/first model.qk_norm=true --output runs/normed --rewarm 200
      megatron-stable surgery runs/first model.recipe=qk_norm_cap loss.z_loss=1e-4 --output runs/capped
      megatron-stable surgery runs/first/checkpoints/step_00001000 model.layers=32 --output runs/deeper
    """
    run, step = _named(source, step)
    whole = newest_whole(run, step, verify=False)
    before = stored_config(whole.directory, whole.manifest)
    length = before.warmup_steps if rewarm is None else rewarm
    after = planned(before, amended(before, overrides), (whole.step, length) if length else None)
    if not changes(before, after).keys() - {"schedule.rewarm"}:
        raise ConfigError(f"{' '.join(overrides)}: the checkpoint of step {whole.step} is that already")
    after = after.model_copy(update={"run": after.run.model_copy(update={"directory": str(output)})})
    looked_at = samples(before, after, whole.manifest.state.course, stages_of(run), whole.step, data, sequences)
    with explain_os_errors("write", output), appearing(output) as beside, Progress(transient=True) as progress:
        task = progress.add_task(f"step {whole.step} to {output}", total=None)
        new = RunDirectory(beside)
        done = perform(
            whole,
            before,
            after,
            looked_at,
            new.checkpoints / directory_name(whole.step),
            on_progress=lambda now, all_: progress.update(task, completed=now, total=all_),
        )
        point_latest(new.checkpoints, whole.step)
        new.commit(done.config)
        write_report(beside, whole.directory, done)
        new.log(
            Surgery(
                step=whole.step,
                by="user",
                rule="named by the user",
                source=str(whole.directory),
                rollback_to=whole.step,
                changes=done.changes,
                before=done.continuity.before,
                after=done.continuity.after,
                verdict=done.continuity.verdict,
            )
        )
    print(json.dumps(facts(whole.directory, done), indent=1) if as_json else "\n".join(_said(output, done)))


def _named(source: Path, step: int | None) -> tuple[Path, int | None]:
    """(run, step) of what was named."""
    if not (source / MANIFEST).is_file():
        return source, step
    match = COMPLETE.fullmatch(source.resolve().name)
    if match is None:
        raise ConfigError(f"{source} is a checkpoint, but not of a run's checkpoints/; name the run, and --step")
    if step is not None and step != int(match[1]):
        raise ConfigError(f"--step {step} is not that of {source}: leave it out, or name the run")
    return source.resolve().parents[1], int(match[1])


def _said(output: Path, done: Operated) -> list[str]:
    before, after = done.parameters
    least = done.config.parallel.tensor * done.config.parallel.pipeline
    return [
        f"{output}: step {done.whole.step}, {before:,} parameters before, {after:,} after",
        *(f"  {key}: {plain(old)} -> {plain(new)}" for key, (old, new) in done.changes.items()),
        *done.continuity.lines(),
        "train it on with",
        f"  megatron-stable pretrain --config {output / 'config.yaml'}" + (f" --ranks {least}" if least > 1 else ""),
    ]
