"""`megatron-stable pretrain`: train, alone or on several ranks of this machine."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def pretrain(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Fields to override, by dotted key.")
    ] = None,
    config: Annotated[Path, typer.Option(help="The run's YAML; see `megatron-stable init`.")] = Path("config.yaml"),
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks to start on this machine with DeepSpeed's launcher.")
    ] = None,
) -> None:
    """Train a model. The same command goes on where the last one stopped, or was killed.

    Ctrl-C or SIGTERM finishes the step in progress, saves and exits. On many machines start the same thing with a
    launcher: deepspeed, torchrun, srun and mpirun all work with `megatron_stable.pretrain`.

    \b
    Example:
      megatron-stable pretrain --config config.yaml
      megatron-stable pretrain --config config.yaml --ranks 2 parallel.tensor=2 run.steps=2000
      deepspeed --hostfile hosts --module megatron_stable.pretrain --config config.yaml
    """
    from megatron_stable.config.checks import check
    from megatron_stable.config.load import load_config

    given = overrides or []
    loaded = load_config(config, given)
    if ranks is None:
        from megatron_stable.training.pretrain import guarded

        code = guarded(loaded)
    else:
        from megatron_stable.training.launch import launch

        check(loaded, ranks)  # before seconds of starting up
        code = launch(["--config", str(config), *given], ranks)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code) if code else sys.exit(0)
