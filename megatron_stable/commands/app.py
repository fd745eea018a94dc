"""The program `megatron-stable`: its verbs, its version, and how errors end it."""

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from megatron_stable.errors import MegatronStableError

# in the order in which a newcomer meets them; each is the function of its name in the module of its name
VERBS = [
    "demo", "init", "tokenizer", "preprocess", "pretrain", "evaluate", "generate", "spikes", "checkpoints", "inspect",
    "skip", "convert",
]  # fmt: skip

app = typer.Typer(
    name="megatron-stable",
    help="Train language models that do not fall over: tensor, pipeline and data parallel, on DeepSpeed.\n\n"
    "Start with `megatron-stable demo`. `megatron-stable VERB --help` explains a verb, with an example.\n\n"
    "Exit codes: 0 done, 1 unexpected error, 2 bad usage or configuration, 3 unrecoverable divergence, "
    "4 loss scale at its floor, 5 data or checkpoint unusable, 130 interrupted.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            print(f"megatron-stable {version('megatron-stable')}")
        except PackageNotFoundError:
            print("megatron-stable, not installed: run from its source")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


for _verb in VERBS:
    app.command(_verb)(getattr(importlib.import_module(f"megatron_stable.commands.{_verb}"), _verb))


def main() -> None:
    """Run the command line. An error that the user can mend is a message and an exit code, any other a traceback."""
    try:
        app(prog_name="megatron-stable")
    except MegatronStableError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
