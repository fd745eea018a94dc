"""`megatron-stable evaluate`: loss, perplexity and bits per byte of a trained run."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from megatron_stable.analysis.evaluation import Evaluation, evaluate_each, open_data
from megatron_stable.analysis.ranks import joined, several
from megatron_stable.analysis.trained import open_on_ranks, open_run
from megatron_stable.commands.again import as_rank, on_ranks, said_once
from megatron_stable.errors import ConfigError
from megatron_stable.numbers import finite
from megatron_stable.parallel import agreement
from megatron_stable.training.pretrain import Tell


def evaluate(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="With ranks: parallel.tensor=N, parallel.pipeline=N; default: the run's layout."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PREFIX",
            help="A .bin/.idx dataset; may be given several times; default: the run's validation data.",
        ),
    ] = None,
    batches: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Use only the first N global batches of each, as evaluation during training does; default: all.",
        ),
    ] = None,
    step: Annotated[int | None, typer.Option(min=1, help="Checkpoint to use; default: the newest.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The SentencePiece model, if it is not where the run's configuration says.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks to start on this machine, each with a part of the model.")
    ] = None,
) -> None:
    """Measure loss, perplexity and bits per byte on one or several datasets.

    Each token is predicted once, in fp32. It runs in one process, on the GPU if there is one; with --ranks, or under
    torchrun, deepspeed or srun (python -m megatron_stable evaluate ...), each rank has its own part of the model, and
    copies of it share the data. Of a blend, each source is told by itself.

    Example:
      megatron-stable evaluate runs/first
      megatron-stable evaluate runs/first --data code=held_out/code --data prose=held_out/prose --json
      megatron-stable evaluate runs/30b --ranks 8 parallel.tensor=8
    """
    with said_once():
        named = _named(data or [])
    if ranks is not None:
        raise on_ranks(context, ranks)

    def work(tell: Tell = lambda error: None) -> int:
        with joined(tell) as lifeline:
            if lifeline is None:
                if overrides:
                    raise ConfigError(f"{overrides[0]}: one process has no layout; give --ranks N")
                trained = open_run(run, step, tokenizer)
                datasets = {name: open_data(trained, prefix) for name, prefix in named.items()}
            else:
                trained = open_on_ranks(run, step, tokenizer, lifeline, overrides or [])
                with agreement.together():
                    datasets = {name: open_data(trained, prefix) for name, prefix in named.items()}
            with Progress(console=Console(stderr=True), disable=not trained.ranks.first) as bar:
                task = bar.add_task("evaluate", total=None)
                found, whole = evaluate_each(
                    trained, datasets, batches, progress=lambda n, total: bar.update(task, completed=n, total=total)
                )
            if trained.ranks.first and as_json:
                source = trained.config.data.validation if not data else data[0] if len(data) == 1 else data
                sources = [{"name": name, **_facts(each)} for name, each in found.items()]
                facts = {"run": str(run), "step": trained.step, "data": source, **_facts(whole), "sources": sources}
                typer.echo(json.dumps(facts))
            elif trained.ranks.first:
                _print(trained.step, found, whole)
        return 0

    if several():
        as_rank(work)
    work()


def _named(data: list[str]) -> dict[str, str | None]:
    """Prefixes by name; a dataset without one goes by its prefix."""
    named: dict[str, str | None] = {}
    for given in data:
        name, _, prefix = given.partition("=")
        if not prefix or Path(f"{given}.idx").exists():
            name, prefix = given, given
        if name in named:
            raise ConfigError(f"--data {given}: there is a dataset {name!r} already; give each a name of its own")
        named[name] = prefix
    return named or {"": None}


def _facts(found: Evaluation) -> dict[str, Any]:
    return {
        "loss": finite(found.loss),
        "standard_error": found.standard_error and finite(found.standard_error),
        "perplexity": finite(found.perplexity),
        "bits_per_byte": found.bits_per_byte and finite(found.bits_per_byte),
        "tokens": found.tokens,
        "bytes": found.bytes,
    }


def _print(step: int, found: dict[str, Evaluation], whole: Evaluation) -> None:
    if len(found) > 1:
        width = max(map(len, found))
        typer.echo(f"{'':{width}}  {'loss':>8} {'+-':>7} {'perplexity':>10} {'bits/byte':>9} {'tokens':>14}")
        for name, each in found.items():
            error = "" if each.standard_error is None else f"{each.standard_error:.4f}"
            bits = "" if each.bits_per_byte is None else f"{each.bits_per_byte:.4f}"
            typer.echo(
                f"{name:{width}}  {each.loss:8.4f} {error:>7} {each.perplexity:10.4g} {bits:>9} {each.tokens:14,}"
            )
    per_byte = f", {whole.bits_per_byte:.4f} bits per byte" if whole.bits_per_byte is not None else ""
    typer.echo(
        f"step {step}: loss {whole.loss:.4f}, perplexity {whole.perplexity:.4g}{per_byte}, over {whole.tokens:,} tokens"
    )
