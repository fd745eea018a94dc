"""The report, for people."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_stable.doctor.finding import Row, Verdict

COLOURS = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.FAILURE: "bold red"}
WIDTH = 120  # of what is written to a file or through pdsh


def print_report(rows: Sequence[Row], hosts: Sequence[str]) -> None:
    """A row for each finding, its remedy below it, and the verdict in one line."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH
    grid = Table.grid(padding=(0, 2))
    for column in ("verdict", "check"):
        grid.add_column(column, no_wrap=True)
    grid.add_column("finding")
    for row in rows:
        text = escape(line(row))
        remedy = f"\n[italic]-> {escape(row.remedy)}[/italic]" if row.remedy else ""
        grid.add_row(f"[{COLOURS[row.verdict]}]{row.verdict.word}[/]", escape(row.check), text + remedy)
    with console.capture() as capture:
        console.print(grid)
    print("\n".join(each.rstrip() for each in capture.get().splitlines()))
    print(verdict_line(rows, hosts))


def line(row: Row) -> str:
    """What was found, and where."""
    return f"{row.where}: {row.text}" if row.where else row.text


def verdict_line(rows: Sequence[Row], hosts: Sequence[str]) -> str:
    """What it comes to."""
    failures, warnings = (sum(row.verdict is v for row in rows) for v in (Verdict.FAILURE, Verdict.WARNING))
    ranks, machines = _count(len(hosts), "rank"), _count(len(set(hosts)), "machine")
    found = [_count(failures, "failure")] * (failures > 0) + [_count(warnings, "warning")] * (warnings > 0)
    if failures:
        return f"{', '.join(found)} on {ranks} of {machines}: mend what failed before a run"
    return f"{', '.join(found) or 'nothing is wrong'} on {ranks} of {machines}: fit to train"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
