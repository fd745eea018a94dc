"""`megatron-stable screen`: which data source raises the risk of loss spikes, by small runs."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from megatron_stable.analysis.drawing import png
from megatron_stable.commands.sweep import train
from megatron_stable.errors import ConfigError, DataError
from megatron_stable.files import write_file
from megatron_stable.study.screened import Screening
from megatron_stable.study.screening import FACTOR, NEAR, SEEDS, WINDOWS, Asked, arms, ask, edge, edge_of, search
from megatron_stable.study.screening_figure import picture
from megatron_stable.study.screening_words import factor_of, percent
from megatron_stable.study.suspects import judge
from megatron_stable.study.sweep import Sweep

RECORD, PICTURE = "screening.json", "screening.png"


def screen(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Fields of the proxy to override, by dotted key.")
    ] = None,
    config: Annotated[Path, typer.Option(help="The YAML of a proxy, a small run; data.train is the blend.")] = Path(
        "config.yaml"
    ),
    output: Annotated[Path, typer.Option(metavar="DIR", help="Everything goes there.")] = Path("screens/first"),
    lr: Annotated[float | None, typer.Option(help="Learning rate. Default: a fifth of the largest stable one.")] = None,
    sweep: Annotated[
        Path | None, typer.Option(help="A sweep of learning rates that has the largest stable one. Default: search.")
    ] = None,
    factor: Annotated[float, typer.Option(help="Multiply a source's weight by this; 0: leave it out.")] = FACTOR,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm.")] = SEEDS,
    windows: Annotated[int, typer.Option(min=16, help="Windows of each source that are looked at.")] = WINDOWS,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time. Default: one per GPU, or per core.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be trained.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON instead of a table.")] = False,
) -> None:
    """Say which source of the training data raises the risk of loss spikes.

    Trains small runs near the edge of stability: the plain blend, and an arm for each source, up-weighted, all with the
    same seeds. Compares tails of gradient norms, detections and second opinions, and asks states of the plain blend's
    runs how far windows of each source would move them. Intervals hold together, with 95 %. The same command goes on
    where it was stopped. docs/screening.md explains every number.

    Example:
      megatron-stable screen --config proxy.yaml data.train=blend.yaml --lr 3e-3 --output screens/first
      megatron-stable screen --config proxy.yaml --sweep sweeps/proxies --seeds 5
    """
    if lr is not None and sweep is not None:
        raise ConfigError("--lr and --sweep do not go together: give one")
    if lr is not None and not 0 < lr < float("inf"):
        raise ConfigError(f"--lr {lr:g} is not a positive number")
    asked = ask(output, config, overrides or [], factor, seeds)
    if lr is None and sweep is not None:
        lr = _near(edge_of(sweep, asked.config))
    if lr is None and dry_run:
        print(f"{len(search(asked).cells)} runs to find the largest stable learning rate, then")
        print(f"{(len(asked.sources) + 1) * seeds} runs at a fifth of it")
        return
    work = Sweep(arms(asked, lr if lr is not None else _near(_searched(asked, jobs))))
    if dry_run:
        for cell in work.cells:
            print(cell.name)
        return
    _train(work, jobs)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("windows", total=None)
        found = judge(asked, work.grid, windows, lambda total: progress.update(task, total=total, advance=1))
    text = found.record.model_dump_json(indent=1)
    write_file(output / RECORD, f"{text}\n".encode())
    write_file(output / PICTURE, png(picture(found)))
    if as_json:
        print(text)
    else:
        _print(found.record, output)


def _near(rate: float) -> float:
    return float(f"{NEAR * rate:.3g}")


def _searched(asked: Asked, jobs: int | None) -> float:
    work = Sweep(search(asked))
    _train(work, jobs)
    return edge(work.rows())


def _train(work: Sweep, jobs: int | None) -> None:
    """Train what is open; a screening needs all of its runs."""
    if work.open():
        train(work, jobs)
    work.write()
    failed = [row for row in work.rows() if row["status"] not in ("finished", "diverged")]
    if failed:
        raise DataError(
            f"{len(failed)} of {len(work.cells)} runs failed, so nothing is compared; the same command tries them "
            f"again. The first: {failed[0]['name']}: {failed[0]['reason']}"
        )


def _print(record: Screening, output: Path) -> None:
    console = Console(highlight=False)
    console.print(
        f"{len(record.seeds)} seeds of each arm, {record.steps} steps at learning rate {record.learning_rate:g}; "
        f"{record.windows} windows of each source, or all it has, at {record.states} states. "
        "All intervals together hold with 95 %."
    )
    table = Table(
        "source", "weight", "odd windows", "loss over blend's", "tail of gradient norms", "spikes",
        "diverged", "verdict", box=None, pad_edge=False,
    )  # fmt: skip
    seeds = len(record.seeds)
    for each in record.sources:
        table.add_row(
            each.name, f"{each.share[0]:.0%} → {each.share[1]:.0%}", percent(each.odd), f"{each.gap:+.2f}",
            factor_of(each.tail), str(each.events.spikes), f"{each.events.diverged} of {seeds}", each.verdict,
        )  # fmt: skip
    console.print(table)
    console.print(f"Control: {record.control.spikes} spikes, {record.control.diverged} of {seeds} diverged\n")
    for line in record.recommendation:
        console.print(line, soft_wrap=True)
    console.print(f"\n{output / RECORD}, {output / PICTURE}", soft_wrap=True)
