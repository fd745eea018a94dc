"""`megatron-stable pretrain`: train, alone or on several ranks of this machine."""

from pathlib import Path
from typing import Annotated, get_args

import typer

from megatron_stable.config.checks import check
from megatron_stable.config.load import load_config
from megatron_stable.config.schema import Verbosity
from megatron_stable.launching.local import TRAINING, launch
from megatron_stable.training.pretrain import run_to_exit_code


def pretrain(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Fields to override, by dotted key.")
    ] = None,
    config: Annotated[Path, typer.Option(help="The run's YAML; see `megatron-stable init`.")] = Path("config.yaml"),
    verbosity: Annotated[
        Verbosity | None,
        typer.Option(
            metavar="|".join(get_args(Verbosity)),
            help="What to print; sets logging.verbosity, which other launchers take as an override.",
        ),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks to start on this machine with DeepSpeed's launcher.")
    ] = None,
) -> None:
    """Train a model, or resume training where it stopped.

    The same command starts a run and resumes it, also after a crash. Ctrl-C or SIGTERM finishes the current step, saves
    and exits. To train on many machines, start `megatron_stable.pretrain` with deepspeed, torchrun, srun or mpirun.

    Example:
      megatron-stable pretrain --config config.yaml
      megatron-stable pretrain --config config.yaml --ranks 2 parallel.tensor=2 run.steps=2000
      deepspeed --hostfile hosts --module megatron_stable.pretrain --config config.yaml
    """
    given = [*(overrides or []), *([f"logging.verbosity={verbosity}"] if verbosity else [])]
    loaded = load_config(config, given)
    if ranks is None:
        code = run_to_exit_code(loaded)
    else:
        check(loaded, ranks)  # here, rather than after seconds of starting ranks
        code = launch(TRAINING, ["--config", str(config), *given], ranks)
    raise typer.Exit(code)
