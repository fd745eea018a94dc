"""`megatron-stable data inspect`: what is in a dataset."""

import dataclasses
import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_stable.analysis.data import MOST, DataFacts, inspect_data, picture
from megatron_stable.data import Tokenizer
from megatron_stable.data.shards import open_tokens
from megatron_stable.errors import DataError
from megatron_stable.files import write_file


class Action(str, Enum):
    """What can be done with a dataset."""

    inspect = "inspect"


def data(
    action: Annotated[Action, typer.Argument(metavar="inspect", help="What to do.")],
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="A .bin/.idx, shards, or a glob of them.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="The tokenizer of the data, to show text: a .model, a .json or a directory.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Documents to show the beginnings of.")] = 3,
    documents: Annotated[
        int, typer.Option(min=1, help="Look at so many documents, evenly spaced, if there are more.")
    ] = MOST,
    figure: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw how long documents are.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what is in a dataset: documents, tokens, lengths, duplicates, and with its tokenizer what the text is like.

    Duplicates are documents with equal tokens, found by hash. What is no text are control characters and bytes that are
    not UTF-8.

    Example:
      megatron-stable data inspect data/train --tokenizer data/tokenizer.model --figure lengths.png
      megatron-stable data inspect 'data/web-*' --json
    """
    opened, model = open_tokens(prefix), Tokenizer(tokenizer) if tokenizer is not None else None
    made_with = (opened.metadata or {}).get("tokenizer_sha256")
    if model is not None and made_with not in (None, model.sha256):
        raise DataError(f"dataset {prefix} was made with another tokenizer than {tokenizer}: name the right one")
    facts = inspect_data(opened, model, samples, documents)
    if figure is not None:
        write_file(figure, picture(facts, Path(prefix).name))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(facts)))
        return
    _print(facts, prefix)


def _print(facts: DataFacts, prefix: str) -> None:
    pieces = f" in {facts.shards} shards" if facts.shards else ""
    typer.echo(f"{prefix}: {facts.documents:,} documents, {facts.tokens:,} tokens ({facts.dtype}){pieces}")
    if facts.examined < facts.documents:
        typer.echo(f"looked at {facts.examined:,} documents, evenly spaced")
    share = facts.duplicates / facts.examined
    typer.echo(f"duplicates: {facts.duplicates:,} of {facts.examined:,} documents ({share:.2%})")
    if facts.not_text is not None:
        typer.echo(f"no text: {facts.not_text:.3%} of the bytes at the beginning of {facts.decoded:,} documents")
    table = Table(*(f"{float(quantile):.0%}" for quantile in facts.lengths), title="tokens of a document, by quantile")
    table.add_row(*(f"{length:,}" for length in facts.lengths.values()))
    Console().print(table)
    for document, beginning in facts.samples:
        typer.echo(f"document {document}: {beginning!r}")
