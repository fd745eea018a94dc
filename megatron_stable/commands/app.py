"""The program `megatron-stable`: its verbs, its version, and how errors end it."""

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from megatron_stable.commands.verbs import Verbs
from megatron_stable.errors import MegatronStableError

app = typer.Typer(
    name="megatron-stable",
    cls=Verbs,
    help="Train language models that do not fall over: tensor, pipeline and data parallel, on DeepSpeed.\n\n"
    "Start with `megatron-stable demo`. `megatron-stable VERB --help` explains a verb, with an example.\n\n"
    "Exit codes: 0 done, 1 unexpected error, 2 bad usage or configuration, 3 unrecoverable divergence, "
    "4 loss scale at its floor, 5 data or checkpoint unusable, 130 interrupted.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    subcommand_metavar="VERB ...",
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


def run_verb(arguments: Sequence[str]) -> int:
    """Run one command line in this process; returns its exit code.

    An error that the user can mend is a message on stderr; any other is raised.
    """
    try:
        app(list(arguments), prog_name="megatron-stable")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except MegatronStableError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def main() -> None:
    """Run the command line that this process was started with."""
    sys.exit(run_verb(sys.argv[1:]))
