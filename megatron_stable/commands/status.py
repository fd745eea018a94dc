"""`megatron-stable status`: where a run is trained, how far it is, and what happened to it last."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_stable.analysis.status import Status, status_of
from megatron_stable.parallel.heartbeat import spans
from megatron_stable.training.progress import duration


def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Say whether a run is being trained and where, its step, its rate, the time left, and its last events.

    Ranks of a run that has lost its rank 0 and train on nevertheless are named, with their process ids.

    Example:
      megatron-stable status runs/first
      megatron-stable status runs/first --json
    """
    found = status_of(run)
    if as_json:
        print(found.model_dump_json(indent=1))
        return
    print(_text(run, found))


def _text(run: Path, found: Status) -> str:
    ranks = ", ".join(f"{host}: {spans(numbers)}" for host, numbers in found.hosts.items())
    if found.running:
        lines = [f"{run} is being trained by {found.running}; {ranks or 'its ranks are starting'}"]
    else:
        again = "; the command that started it goes on" if found.step < found.steps else ""
        lines = [f"{run} is not being trained{again}"]
    numbers = {
        "loss {:.4f}": found.loss,
        "grad norm {:.3g}": found.grad_norm,
        "{:,.0f} tokens/s": found.tokens_per_second,
    }
    progress = [f"step {found.step:,} of {found.steps:,}"]
    progress += [form.format(number) for form, number in numbers.items() if number is not None]
    if found.seconds_left is not None:
        progress.append(f"{duration(found.seconds_left)} left")
    lines.append(" · ".join(progress))
    if found.epochs:
        lines.append(
            "data read: " + ", ".join(f"{name} {epochs:.3g}" for name, epochs in found.epochs.items()) + " epochs"
        )
    lines.append(f"checkpoint: step {found.checkpoint:,}" if found.checkpoint is not None else "no checkpoint yet")
    if found.orphans:
        pids = " ".join(map(str, found.orphans.values()))
        lines.append(f"{spans(found.orphans)} of its last start live on here without rank 0; to end them: kill {pids}")
    if found.events:
        lines += ["last events:", *(f"  {event}" for event in found.events)]
    return "\n".join(lines)
