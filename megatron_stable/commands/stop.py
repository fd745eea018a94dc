"""`megatron-stable stop`: end a run in order, under any launcher and from any machine that sees its directory."""

import getpass
import socket
import time
from pathlib import Path
from typing import Annotated

import typer

from megatron_stable.errors import ConfigError
from megatron_stable.records.directory import RunDirectory, require_run
from megatron_stable.records.presence import ask_to_stop, owner
from megatron_stable.stability.events import Stop


def stop(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.")],
    now: Annotated[
        bool, typer.Option("--now", help="Without saving: the steps since the last checkpoint are trained again.")
    ] = False,
    wait: Annotated[bool, typer.Option(help="Return when the run has ended, or at once.")] = True,
) -> None:
    """Stop a run: it finishes the step in progress, saves and ends with exit code 0 on all ranks.

    No signal is needed, so no launcher kills what takes its time. The command that started the run resumes it.

    Example:
      megatron-stable stop runs/first
      megatron-stable stop runs/first --now --no-wait
    """
    require_run(run)
    found = owner(run)
    if found is None:
        raise ConfigError(f"{run} is not being trained; `megatron-stable status {run}` says what became of it")
    ledger = RunDirectory(run).ledger
    before = len(list(ledger.read()))
    ask_to_stop(run, found, f"stopped by {getpass.getuser()} on {socket.gethostname()}", save=not now)
    print(f"{found} is asked to stop", flush=True)
    while wait and (at := owner(run)) is not None and at.token == found.token:
        time.sleep(0.5)
    if wait:
        ends = [event for event in list(ledger.read())[before:] if isinstance(event, Stop)]
        print(ends[-1].sentence() if ends else f"{found} has ended; `megatron-stable status {run}` says how")
