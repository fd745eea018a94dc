"""`megatron-stable sweep`: train a grid of small runs, and make one table of them."""

import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from megatron_stable.errors import ConfigError
from megatron_stable.model.transformer import parameter_count
from megatron_stable.study.grid import Cell, read_grid
from megatron_stable.study.outcome import read_ended
from megatron_stable.study.pool import Change, places
from megatron_stable.study.sweep import Part, Sweep
from megatron_stable.study.table import TABLE, Row
from megatron_stable.study.worker import WHOLE, last_records
from megatron_stable.training.flops import flops_per_token
from megatron_stable.training.progress import duration


def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The sweep's YAML; docs/sweep.md shows one.")],
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time. Default: one per GPU and rank, or per core.")
    ] = None,
    retries: Annotated[int, typer.Option(min=0, help="Times that a run that failed is tried again.")] = 1,
    part: Annotated[str, typer.Option(metavar="I/N", help="Train each N-th run alone, from the I-th on.")] = "1/1",
    commands: Annotated[
        int | None, typer.Option(min=1, help="Train nothing; print so many commands that share the work.")
    ] = None,
    slurm: Annotated[
        int | None, typer.Option(min=1, help="Train nothing here; submit so many Slurm jobs that share the work.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Of --slurm, as submitit has them: slurm_partition=gpu, timeout_min=60."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say which runs there are, and how they stand.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Train nothing; make the table of what is there.")] = False,
) -> None:
    """Train a grid of small runs: learning rates, sizes, recipes, seeds; and make one table of them.

    The same command goes on where a sweep was stopped: runs that ended are kept, those that failed are tried again. A
    run that diverges ends early, and is no failure. At the end, table.csv and table.parquet in the sweep's directory
    have a row for each run; `megatron-stable report` draws them.

    Example:
      megatron-stable sweep rates.yaml --dry-run
      megatron-stable sweep rates.yaml --jobs 2
      megatron-stable sweep rates.yaml --slurm 16 --option slurm_partition=gpu --option gpus_per_node=1
    """
    chosen = [name for name, given in _exclusive(commands, slurm, dry_run, table) if given]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} do not go together: give one")
    if option and slurm is None:
        raise ConfigError("--option is for --slurm")
    of_training = (("--jobs", jobs is not None), ("--retries", retries != 1), ("--part", part != "1/1" and not dry_run))
    idle = [name for name, given in of_training if given] if chosen else []
    if idle:
        raise ConfigError(f"{' and '.join(idle)} have no effect with {chosen[0]}, which trains nothing here")
    work = Sweep(read_grid(file), _part(part))
    if commands is not None:
        for number in range(1, commands + 1):
            print(shlex.join(["megatron-stable", "sweep", str(file), "--part", f"{number}/{commands}"]))
    elif dry_run:
        _list(work)
    elif table:
        _tell(work, work.write())
    elif slurm is not None:
        from megatron_stable.study.slurm import submit

        for job in submit(work, slurm, option or []):
            print(job)
    else:
        train(work, jobs, retries)
        _tell(work, work.rows())


def _exclusive(commands: int | None, slurm: int | None, dry_run: bool, table: bool) -> Iterator[tuple[str, bool]]:
    yield from (("--commands", commands is not None), ("--slurm", slurm is not None))
    yield from (("--dry-run", dry_run), ("--table", table))


def _part(text: str) -> Part:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"--part {text}: give I/N, I from 1 to N")
    return Part(int(found[1]), int(found[2]))


def train(work: Sweep, jobs: int | None, retries: int = 1) -> None:
    """Train what is open of a sweep, and show on the terminal how that goes."""
    jobs, devices = places(work.grid.ranks, jobs)
    waiting = work.open()
    kept = len(work.mine) - len(waiting)
    print(f"{len(work.mine)} runs" + (f", {kept} of them ended before" if kept else "") + f", {jobs} at a time")
    shown = Shown(waiting)
    console = Console()
    if console.is_terminal and waiting:
        with Live(console=console, refresh_per_second=2, get_renderable=shown.render) as live:
            for change in work.train(jobs, devices, retries):
                for line in shown.follow(change):
                    live.console.print(line, markup=False, highlight=False)
    else:
        for change in work.train(jobs, devices, retries):
            for line in shown.follow(change):
                print(line, flush=True)


class Shown:
    """What a sweep has done and does, for the terminal."""

    def __init__(self, cells: list[Cell]) -> None:
        self.work = {cell.name: _work(cell) for cell in cells}
        self.total, self.began = sum(self.work.values()), time.monotonic()
        self.ended: Counter[str] = Counter()
        self.done, self.count = 0.0, len(cells)
        self.running: tuple[Cell, ...] = ()

    def follow(self, change: Change) -> Iterator[str]:
        """Lines on what has ended."""
        self.running = change.running
        cell, ended = change.cell, change.ended
        if cell is None or ended is None:
            return
        if change.again:
            yield f"{cell.name} failed, and is tried again: {ended.reason}"
            return
        self.ended[ended.status] += 1
        self.done += self.work[cell.name]
        number = sum(self.ended.values())
        last = list(last_records(cell.directory, WHOLE))[-1:]
        loss = last[0].get("loss") if last else None
        at = f"loss {loss:.4f}" if isinstance(loss, float) else "no loss"
        what = f"{at} at step {last[0]['step']}" if last else "before its first step"
        line = f"[{number}/{self.count}] {cell.name}: {ended.status}, {what}"
        yield line if ended.reason is None else f"{line}: {ended.reason}"

    def render(self) -> Group:
        """What is in progress."""
        progress = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
        now, parts = self.done, Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for cell in self.running:
            record = (list(last_records(cell.directory)) or [{}])[-1]
            step, steps, loss = record.get("step", 0), cell.config.run.steps, record.get("loss")
            now += self.work[cell.name] * step / steps
            parts.add_row(cell.name, f"step {step}/{steps}", f"loss {loss:.4f}" if isinstance(loss, float) else "")
        passed = time.monotonic() - self.began
        left = f"{duration(passed * (self.total / now - 1))} left" if now > 0.01 * self.total else ""
        counts = ", ".join(f"{count} {status}" for status, count in self.ended.items())
        progress.add_task(
            f"{sum(self.ended.values())}/{self.count}", total=self.total, completed=int(now),
            left=" · ".join(filter(None, (left, counts))),
        )  # fmt: skip
        return Group(progress, parts)


def _work(cell: Cell) -> float:
    """Floating-point operations of a run."""
    return flops_per_token(cell.config.model) * cell.config.tokens_per_step * cell.config.run.steps


def _list(work: Sweep) -> None:
    for cell in work.mine:
        ended, (_, parameters) = read_ended(cell.directory), parameter_count(cell.config.model)
        status = ended.status if ended else "unfinished"
        print(f"{status:10}  {parameters:>13,} parameters  {_work(cell):8.2e} FLOPs  {cell.name}")
    print(f"{len(work.mine)} runs, {sum(map(_work, work.mine)):.2e} FLOPs; {len(work.open())} to be trained")


def _tell(work: Sweep, rows: list[Row]) -> None:
    counts = Counter(row["status"] for row in rows)
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    print(f"{work.directory / TABLE}.csv and .parquet; `megatron-stable report {work.directory}` draws them")
    mine = {cell.name for cell in work.mine}
    failed: list[dict[str, Any]] = [row for row in rows if row["status"] == "failed" and row["name"] in mine]
    if failed:
        for row in failed:
            print(f"error: {row['name']}: {row['reason']}", file=sys.stderr)
        raise typer.Exit(1)
