"""`megatron-stable evaluate`: loss and perplexity of a trained run."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from megatron_stable.analysis.evaluation import evaluate as measure
from megatron_stable.analysis.evaluation import open_data
from megatron_stable.analysis.trained import open_run
from megatron_stable.numbers import finite


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.")],
    data: Annotated[
        str | None, typer.Option(metavar="PREFIX", help="A .bin/.idx dataset; default: the run's validation data.")
    ] = None,
    batches: Annotated[
        int | None,
        typer.Option(
            min=1, help="Use only the first N global batches, as evaluation during training does; default: all."
        ),
    ] = None,
    step: Annotated[int | None, typer.Option(min=1, help="Checkpoint to use; default: the newest.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The SentencePiece model, if it is not where the run's configuration says.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure loss and perplexity on a dataset.

    Each token is predicted once, in fp32, in one process, on the GPU if there is one.

    Example:
      megatron-stable evaluate runs/first
      megatron-stable evaluate runs/first --data other_text --batches 20 --json
    """
    trained = open_run(run, step, tokenizer)
    dataset = open_data(trained, data)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("evaluate", total=None)
        result = measure(
            trained, dataset, batches, progress=lambda n, total: bar.update(task, completed=n, total=total)
        )
    if as_json:
        facts = {
            "run": str(run),
            "step": trained.step,
            "data": data if data is not None else trained.config.data.validation,
            "loss": finite(result.loss),
            "perplexity": finite(result.perplexity),
            "bits_per_byte": result.bits_per_byte and finite(result.bits_per_byte),
            "tokens": result.tokens,
        }
        typer.echo(json.dumps(facts))
        return
    per_byte = f", {result.bits_per_byte:.4f} bits per byte" if result.bits_per_byte is not None else ""
    typer.echo(
        f"step {trained.step}: loss {result.loss:.4f}, perplexity {result.perplexity:.4g}{per_byte}, "
        f"over {result.tokens:,} tokens"
    )
