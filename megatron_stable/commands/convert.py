"""`megatron-stable convert`: a checkpoint for another layout."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from megatron_stable.checkpoint.catalog import newest_whole
from megatron_stable.config.load import parse_config
from megatron_stable.convert.reshard import reshard
from megatron_stable.files import explain_os_errors
from megatron_stable.records.directory import RunDirectory
from megatron_stable.stability.events import Converted


def convert(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.")],
    output: Annotated[Path, typer.Option(help="The new run's directory.")],
    tensor: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    pipeline: Annotated[int, typer.Option(min=1, help="Pipeline stages.")] = 1,
    data: Annotated[int, typer.Option(min=1, help="Data-parallel replicas that share each parameter's state.")] = 1,
    step: Annotated[int | None, typer.Option(help="The checkpoint; default: the newest complete one.")] = None,
) -> None:
    """Rewrite a checkpoint, optimizer state included, for another layout.

    It runs without a GPU and holds one tensor in memory at a time. `pretrain` reads a checkpoint of any layout, so
    this is only needed where each rank should find just its own part.

    Example:
      megatron-stable convert runs/first --output runs/first-tp4 --tensor 4 --data 2
      megatron-stable pretrain --config runs/first-tp4/config.yaml --ranks 8
    """
    entry = newest_whole(run, step)
    ranks = {"tensor": tensor, "pipeline": pipeline, "data": data}
    layout = entry.manifest.layout.model_copy(update=ranks)
    with Progress(transient=True) as progress, explain_os_errors("write", output):
        task = progress.add_task(f"step {entry.step} to {layout.ranks} ranks", total=None)
        final = reshard(
            entry.directory,
            entry.manifest,
            output / "checkpoints",
            layout,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    config = parse_config(entry.manifest.config)
    parallel = config.parallel.model_copy(update={"tensor": tensor, "pipeline": pipeline})
    if pipeline > 1:
        parallel = parallel.model_copy(update={"zero_stage": 1})
    new = config.model_copy(
        update={"parallel": parallel, "run": config.run.model_copy(update={"directory": str(output)})}
    )
    directory = RunDirectory(output)
    directory.claim(new)
    try:
        directory.commit(new)
        directory.ledger.write(Converted(step=entry.step, source=str(entry.directory), **ranks))
    finally:
        directory.release()
    print(f"{final}: step {entry.step} for TP {tensor} x PP {pipeline} x DP {data}; resume with")
    print(f"  megatron-stable pretrain --config {directory.config} --ranks {layout.ranks}")
