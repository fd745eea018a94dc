"""`megatron-stable checkpoints`: which checkpoints a run has, and whether they are whole."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_stable.checkpoint import store
from megatron_stable.checkpoint.catalog import summary
from megatron_stable.errors import DataError


def checkpoints(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and check its checksum.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List a run's checkpoints: step, size, layout, and whether each is complete.

    An incomplete one is listed with the reason. With --verify, every byte is read and compared with its checksum. Exit
    code 5 if any checkpoint cannot be used.

    Example:
      megatron-stable checkpoints runs/first
      megatron-stable checkpoints runs/first --verify --json
    """
    root = run / "checkpoints"
    if not root.is_dir():
        raise DataError(f"{run} is not a run's directory: it has no checkpoints/; name the run.directory of a run")
    found = [(entry, store.damage(entry) if verify else store.missing(entry)) for entry in store.entries(root)]
    if as_json:
        print(json.dumps([summary(entry, problem, verified=verify) for entry, problem in found], indent=1))
    elif not found:
        print(f"{root} holds no checkpoints yet")
    else:
        table = Table("step", "health", "size", "layout", "state")
        for entry, problem in found:
            facts = summary(entry, problem, verified=verify)
            size = f"{facts['bytes'] / 1e6:,.1f} MB" if facts["bytes"] is not None else "?"
            layout = facts["layout"]
            text = (
                f"TP {layout['tensor']} x PP {layout['pipeline']} x DP {layout['data']}, "
                f"ZeRO {layout['zero_stage']}, {layout['dtype']}"
                if layout
                else "?"
            )
            state = f"[red]{problem}" if problem else "verified" if verify else "complete"
            table.add_row(str(entry.step), facts["health"], size, text, state)
        Console().print(table)
    if any(problem for _, problem in found):
        raise typer.Exit(DataError.exit_code)
