"""A verb that starts ranks which run the same verb, and what it is on such a rank."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from megatron_stable.analysis.ranks import several
from megatron_stable.errors import MegatronStableError
from megatron_stable.launching.local import Program, launch
from megatron_stable.parallel.launcher import refuse
from megatron_stable.training.pretrain import Tell, to_exit_code

USE = Program("megatron_stable", "", ("stopped", 1))


def on_ranks(context: typer.Context, ranks: int) -> typer.Exit:
    """Run this command line, less ``--ranks``, on so many ranks of this machine; the end that it comes to."""
    return typer.Exit(launch(USE, command_line(context, "ranks"), ranks))


@contextmanager
def said_once() -> Iterator[None]:
    """Within, bad usage that any rank can see before it joins the others is told by one of each machine."""
    try:
        yield
    except MegatronStableError as error:
        if not several():
            raise
        raise typer.Exit(refuse(str(error), error.exit_code)) from None


def as_rank(work: Callable[[Tell], int]) -> NoReturn:
    """Do what this rank does with others, and end this process as that ends. Ctrl-C ends all of them at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    code = to_exit_code(work)
    sys.stdout.flush()
    sys.stderr.flush()
    # the ranks have left in order, and what PyTorch does when the interpreter ends may abort it, with another exit code
    os._exit(code)


def command_line(context: typer.Context, without: str) -> list[str]:
    """The verb and its arguments as a shell would give them, without one of the options."""
    options, positional = list[str](), list[str]()
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.name == without or value is None or value is False:
            continue
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if parameter.param_type_name == "argument":
                positional.append(str(each))
            elif each is True:
                options.append(parameter.opts[0])
            else:
                options.append(f"{parameter.opts[0]}={each}")
    return [context.info_name or "", *options, "--", *positional]
