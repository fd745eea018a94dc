"""`megatron-stable inspect`: which documents were in a step's batch, and whether they or the state made it spike."""

import json
import sys
from math import isfinite
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from megatron_stable.analysis.flight import Before
from megatron_stable.analysis.inspection import Document, Inspection, Sample
from megatron_stable.analysis.inspection import inspect as look
from megatron_stable.analysis.position import Position
from megatron_stable.analysis.second_opinion import Heard
from megatron_stable.stability.events import SecondOpinion

ROWS = 20


def inspect(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.")],
    step: Annotated[int | None, typer.Option(help="The optimizer step whose batch to inspect.")] = None,
    data_step: Annotated[
        int | None,
        typer.Option(help="Or the data step: its position in the data order, whether trained on or skipped."),
    ] = None,
    checkpoint: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            metavar="STEP",
            help="Ask the checkpoint of this step: the last before the rise. Give a second one to compare.",
        ),
    ] = None,
    excerpt: Annotated[
        int, typer.Option(min=0, metavar="CHARS", help="Characters of each document's text to show.")
    ] = 100,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The SentencePiece model, if it is not where the run's configuration says.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help=f"List all rows, not just the first {ROWS}.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Name the documents in a step's batch, and tell whether data or state caused a spike.

    Documents are numbered from 0 within their dataset. With --checkpoint, samples are sorted by their loss under it:
    nats per token, in fp32, in one process. It is also asked what the guard asks in a run: what does it make of usual
    batches from before the step, and of this one? If the rise of the loss was in the data, a checkpoint from before it
    sees it too; if it was in the state, one from after it finds the batches from before as bad. Where the run's flight
    recorder kept the steps up to this one, what stood out in them is listed, layer by layer.

    Example:
      megatron-stable inspect runs/first --step 1250
      megatron-stable inspect runs/first --step 1250 --checkpoint 1200
      megatron-stable inspect runs/first --step 1250 --checkpoint 1200 --checkpoint 1300
    """
    chosen = checkpoint or []
    with Progress(console=Console(stderr=True), disable=not chosen) as bar:
        tasks: dict[int, TaskID] = {}

        def progress(at: int, done: int, total: int) -> None:
            if at not in tasks:
                tasks[at] = bar.add_task(f"checkpoint {at}", total=total)
            bar.update(tasks[at], completed=done)

        found = look(run, step, data_step, chosen, excerpt, tokenizer, progress)
    if as_json:
        typer.echo(json.dumps({"run": str(run), **found.plain()}))
        return
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # texts have characters that the terminal's encoding may lack
    console = Console(highlight=False, markup=False, soft_wrap=True)
    names = _names(found)
    _print_position(found, names, console)
    if found.before is not None:
        _print_before(found.before, every, console)
    if not chosen:
        _print_documents([(s, d) for s in found.samples for d in s.documents], found, names, every, console)
        return
    _print_samples(found, names, every, console)
    _print_documents(found.worst_documents, found, names, every, console)
    if isinstance(found.opinion, Heard):
        _print_opinion(found.opinion, found.position, run, console)
    else:
        console.print(f"No verdict: {found.opinion}.")


def _names(found: Inspection) -> dict[str, str]:
    """What tables call the datasets: the last part of a prefix, where that names one only."""
    prefixes = {document.dataset for sample in found.samples for document in sample.documents}
    short = {prefix: Path(prefix).name for prefix in sorted(prefixes)}
    return short if len(set(short.values())) == len(short) else {prefix: prefix for prefix in short}


def _print_position(found: Inspection, names: dict[str, str], console: Console) -> None:
    step, data_step, pieces, record, notes, _ = found.position
    where = f"step {step}, data step {data_step}" if step is not None else f"data step {data_step}"
    tokens = sum(document.tokens for sample in found.samples for document in sample.documents)
    numbers = ", ".join(f"{first} to {end - 1}" for first, end in pieces)
    console.print(f"{where}: samples {numbers}, {tokens:,} tokens of {', '.join(names)}")
    if record is not None:
        loss, norm = (_number(record.get(key), ".4f") for key in ("loss", "grad_norm"))
        console.print(f"recorded then: loss {loss}, gradient norm {norm}")
    for note in notes:
        console.print(f"note: {note}")


def _print_before(before: Before, every: bool, console: Console) -> None:
    console.print(f"inside the model, steps {before.first} to {before.last} ({before.file}):", end=" ")
    if not before.standouts:
        console.print("nothing left its own level")
        return
    console.print("what left its own level, the farthest first")
    for standout in before.standouts if every else before.standouts[:ROWS]:
        console.print(f"- {standout.words()}")
    _print_rest(len(before.standouts), every, console)


def _print_samples(found: Inspection, names: dict[str, str], every: bool, console: Console) -> None:
    title = "Samples, worst first; σ: robust deviations above the median"
    table = Table("sample", title=title, title_justify="left", box=box.SIMPLE_HEAD, min_width=len(title))
    for step in found.checkpoints:
        table.add_column(f"loss at {step}", justify="right", no_wrap=True)
        table.add_column("σ", justify="right", no_wrap=True)
    table.add_column("documents", overflow="fold")
    samples = found.by_loss
    for sample in samples if every else samples[:ROWS]:
        pairs = zip(sample.losses, sample.scores, strict=True)
        numbers = [text for loss, score in pairs for text in (_number(loss, ".4f"), _number(score, "+.1f"))]
        documents = [str(document.number) for document in sample.documents]
        more = f" and {len(documents) - 5} more" if len(documents) > 5 else ""
        name, left_out = names[sample.documents[0].dataset], " (left out of the loss)" * sample.left_out
        table.add_row(str(sample.number), *numbers, Text(f"{name} {', '.join(documents[:5])}{more}{left_out}"))
    console.print(table, soft_wrap=False)
    _print_rest(len(samples), every, console)


def _print_documents(
    rows: list[tuple[Sample, Document]], found: Inspection, names: dict[str, str], every: bool, console: Console
) -> None:
    title = "Documents" + (", first what raises the batch's loss most" if found.checkpoints else "")
    table = Table("sample", title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("document", overflow="fold")
    table.add_column("tokens", no_wrap=True)
    for step in found.checkpoints:
        table.add_column(f"loss at {step}", justify="right")
    if found.checkpoints:
        table.add_column("raises", justify="right", no_wrap=True)
    table.add_column("text", overflow="fold", min_width=16)
    for sample, document in rows if every else rows[:ROWS]:
        numbers = [f"{document.first}-{document.first + document.tokens - 1}"]
        numbers += [_number(loss, ".4f") for loss in document.losses]
        numbers += [_number(document.raises, "+.4f")] if document.raises is not None else []
        name = Text(f"{names[document.dataset]} {document.number}")
        table.add_row(str(sample.number), name, *numbers, Text(document.excerpt))
    console.print(table, soft_wrap=False)
    _print_rest(len(rows), every, console)


def _print_rest(rows: int, every: bool, console: Console) -> None:
    if rows > ROWS and not every:
        console.print(f"and {rows - ROWS} more: --all lists them")


def _print_opinion(heard: Heard, position: Position, run: Path, console: Console) -> None:
    question = heard.question
    rose = f"had risen by {question.rise:.4g} nats" if isfinite(question.rise) else "was not finite"
    console.print(
        f"Verdict: {SecondOpinion.VERDICTS[heard.verdict]}.\n"
        f"The loss {rose} at step {question.onset}; asked about {len(question.old)} batches from before and "
        f"{len(question.recent)} since:"
    )
    for step, said in heard.answers.items():
        if isfinite(said.behind):
            console.print(
                f"- checkpoint {step}: those since are harder by {said.gap:.3g} ± {said.error:.2g}; "
                f"those from before are {said.behind:+.3g} from their recorded loss"
            )
        else:
            console.print(f"- checkpoint {step} gives no finite loss on all of them")
    if heard.ignorant:
        console.print(f"Checkpoint {heard.healthy} is not heard: it had not learnt those from before yet.")
    elif heard.healthy is None and heard.verdict != "data":
        console.print(f"A checkpoint from before step {question.onset} makes it more certain: --checkpoint STEP.")
    if heard.verdict == "data":
        first, last = position.data_steps
        console.print(f"To skip these data: megatron-stable skip {run} --from-step {first} --to-step {last}")
    if heard.verdict == "state":
        console.print(
            "Rolling back to a checkpoint before the rise helps. So may a lower learning rate, or skipping the data,\n"
            "as the state then meets other data (PaLM, arXiv 2204.02311, section 5.1)."
        )


def _number(value: float | None, form: str) -> str:
    return format(value, form) if value is not None and abs(value) < float("inf") else "not finite"
