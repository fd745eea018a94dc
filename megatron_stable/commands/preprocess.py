"""`megatron-stable preprocess`: text to .bin/.idx."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_stable.data import PreprocessSummary
from megatron_stable.data import preprocess as run
from megatron_stable.errors import ConfigError


def preprocess(
    tokenizer: Annotated[
        Path, typer.Option(help="A SentencePiece model, a tokenizer.json, or a directory that holds one of them.")
    ],
    output: Annotated[Path, typer.Option(metavar="PREFIX", help="Writes PREFIX.bin, PREFIX.idx and PREFIX.meta.json.")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="PATH", help="More inputs, as in --input a b c.")] = None,
    input: Annotated[
        list[Path] | None,
        typer.Option(help="Text, .jsonl, .parquet, .arrow or .tar, also .gz or .zst; of a directory, all files in it."),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one per CPU core.")] = None,
    shards: Annotated[
        int | None,
        typer.Option(metavar="N", help="Write N shards, PREFIX-00000-of-N and so on; complete ones are kept."),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="This is machine I of N, from 0: write only its share of the shards, by default one."
        ),
    ] = None,
    validation_fraction: Annotated[
        float, typer.Option(help="Fraction of the documents to put into PREFIX_validation instead.")
    ] = 0.0,
    text_key: Annotated[
        str, typer.Option(help="Key or column that holds the text in JSON, Parquet and Arrow.")
    ] = "text",
    skip_undecodable: Annotated[
        bool, typer.Option("--skip-undecodable", help="Skip documents that are not UTF-8 text, and count them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Tokenize text into Megatron's .bin/.idx format.

    The output does not depend on the number of workers. Shards in order are the same stream of tokens as without. A run
    that was interrupted is run again as it was: it writes the shards that are not complete.

    Example:
      megatron-stable preprocess --input corpus/ --tokenizer tok.model --output corpus --validation-fraction 0.01
      megatron-stable preprocess --input /data/web --tokenizer tok.model --output web --shards 64
      megatron-stable preprocess --input /data/web --tokenizer tok.model --output web --shards 64 --shard 3/8
    """
    inputs = [*(input or []), *(more or [])]
    if not inputs:
        raise ConfigError("no input: name files or directories with --input")
    share = _share(shard) if shard is not None else (0, 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends like Ctrl-C: workers stopped, nothing left behind
    columns = (
        TextColumn("{task.fields[documents]:,} documents"),
        BarColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("preprocess", total=None, documents=0)

        def show(so_far: PreprocessSummary) -> None:
            bar.update(task, completed=so_far.input_bytes, total=so_far.input_total, documents=so_far.documents)

        summary = run(
            inputs,
            tokenizer,
            output,
            workers or _cores(),
            validation_fraction,
            text_key,
            skip_undecodable,
            show,
            share[1] if shards is None and shard is not None else shards,
            share,
        )
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(summary), "tokens_per_byte": summary.tokens_per_byte}))
        return
    for reason in summary.skipped_first:
        typer.echo(f"skipped {reason}", err=True)
    split = f" ({summary.validation_documents:,} for validation)" if summary.validation_documents else ""
    left_out = f"; left out: {summary.empty} empty, {summary.skipped} undecodable"
    typer.echo(
        f"{summary.documents:,} documents{split}, {summary.tokens:,} tokens, {summary.tokens_per_byte:.3f} tokens per "
        f"byte{left_out if summary.empty or summary.skipped else ''}; {_wrote(summary)}"
    )


def _wrote(summary: PreprocessSummary) -> str:
    if not summary.shards_written + summary.shards_kept:
        return f"wrote {', '.join(summary.files)}"
    kept = f", kept {summary.shards_kept} that were complete" if summary.shards_kept else ""
    return f"wrote {summary.shards_written} shards{kept}"


def _share(shard: str) -> tuple[int, int]:
    """ "3/8" as numbers."""
    numbers = shard.split("/")
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise ConfigError(f"--shard {shard}: give the machine and how many there are, from 0/8 to 7/8")
    return int(numbers[0]), int(numbers[1])


def _cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
