"""`megatron-stable tokenizer`: trains a SentencePiece model."""

import dataclasses
import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_stable.data import train_tokenizer
from megatron_stable.errors import ConfigError


class Kind(str, Enum):
    """SentencePiece's algorithms."""

    bpe = "bpe"
    unigram = "unigram"


def tokenizer(
    more: Annotated[list[Path] | None, typer.Argument(metavar="PATH", help="More inputs, as in --input a b c.")] = None,
    input: Annotated[
        list[Path] | None,
        typer.Option(help="Text, .jsonl, .parquet, .arrow or .tar, also .gz or .zst; of a directory, all files in it."),
    ] = None,
    vocab_size: Annotated[
        int, typer.Option(min=1, help="Number of tokens, including 258 for bytes and markers.")
    ] = 32000,
    output: Annotated[Path, typer.Option(help="The model file to write.")] = Path("tok.model"),
    kind: Annotated[Kind, typer.Option(help="Algorithm.")] = Kind.bpe,
    text_key: Annotated[
        str, typer.Option(help="Key or column that holds the text in JSON, Parquet and Arrow.")
    ] = "text",
    sample_mb: Annotated[
        float, typer.Option(min=0.001, help="Train on a uniform sample of this many MB if there is more text.")
    ] = 100.0,
    skip_undecodable: Annotated[
        bool, typer.Option("--skip-undecodable", help="Skip documents that are not UTF-8 text, and count them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Train a SentencePiece tokenizer that can represent any text.

    It falls back to bytes and does not normalise, so that any text comes back exactly as it was.

    Example:
      megatron-stable tokenizer --input corpus/ --vocab-size 32000 --output tok.model
    """
    inputs = [*(input or []), *(more or [])]
    if not inputs:
        raise ConfigError("no input: name files or directories with --input")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        reading = bar.add_task("reading text", total=None)

        def show(done: int, total: int) -> None:
            bar.update(reading, completed=done, total=total)
            if done >= total:
                bar.update(reading, description="training")

        summary = train_tokenizer(
            inputs,
            vocab_size,
            output,
            kind=kind.value,
            text_key=text_key,
            skip_undecodable=skip_undecodable,
            sample_bytes=int(sample_mb * 1e6),
            progress=show,
        )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(summary)))
        return
    left_out = f", {summary.skipped} undecodable documents skipped" if summary.skipped else ""
    typer.echo(
        f"{output}: {summary.vocab_size} tokens, trained on {summary.bytes_sampled / 1e6:.1f} MB "
        f"of {summary.bytes / 1e6:.1f} MB in {summary.documents} documents{left_out}"
    )
