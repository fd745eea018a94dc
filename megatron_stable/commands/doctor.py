"""`megatron-stable doctor`: whether machines, ranks and numerics are fit for a run."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_stable.config.checks import check
from megatron_stable.config.load import load_config
from megatron_stable.launching.local import EXAMINATION, launch
from megatron_stable.training.pretrain import to_exit_code


def doctor(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Fields to override, by dotted key.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="The YAML of the run to come.")] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks to start on this machine with DeepSpeed's launcher.")
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(help="Whose file system to examine; default: run.directory, or this one without --config."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Examine machines, links, disks and numerics before a run.

    Versions, devices, limits, the network, clocks and the file system are looked at on each machine, links are measured
    between ranks, and a tiny model takes a step in the run's precision and layout, whose gradients are compared with
    those of one process. What is wrong is told with its remedy. Exit code 0: fit to train, perhaps with warnings; 2:
    something is to be mended first. To examine many machines, start `megatron_stable.doctor` as the run is started.

    Example:
      megatron-stable doctor
      megatron-stable doctor --config config.yaml --ranks 2 parallel.tensor=2
      deepspeed --hostfile hosts --module megatron_stable.doctor --config config.yaml
    """
    given = overrides or []
    loaded = load_config(config, given) if config is not None or given else None
    if ranks is None:

        def work(tell: object) -> int:
            from megatron_stable.doctor.examination import examine

            return examine(loaded, directory, as_json)

        raise typer.Exit(to_exit_code(work))
    if loaded is not None:
        check(loaded, ranks)  # here, rather than after seconds of starting ranks
    arguments = [*(["--config", str(config)] if config is not None else []), *given]
    arguments += [*(["--directory", str(directory)] if directory is not None else []), *["--json"] * as_json]
    raise typer.Exit(launch(EXAMINATION, arguments, ranks))
