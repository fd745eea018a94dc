"""`megatron-stable generate`: text from a trained run."""

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_stable.analysis.generation import Sampling, generate_each, need_tokenizer, text_pieces
from megatron_stable.analysis.prompts import Prompt, read_prompts
from megatron_stable.analysis.ranks import joined, several
from megatron_stable.analysis.trained import Trained, open_on_ranks, open_run
from megatron_stable.commands.again import as_rank, on_ranks
from megatron_stable.errors import ConfigError
from megatron_stable.training.pretrain import Tell


def generate(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="With ranks: parallel.tensor=N, parallel.pipeline=N; default: the run's layout."
        ),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A text to continue; may be given several times.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help='Prompts as JSON lines: {"prompt": "...", "seed": 1}, or "...".')
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Generate at most this many tokens; a document may end earlier.")
    ] = 200,
    temperature: Annotated[
        float, typer.Option(help="0 always takes the most probable token; 1 samples from the model's distribution.")
    ] = 0.8,
    top_p: Annotated[
        float, typer.Option(help="Sample from the most probable tokens that together have this probability.")
    ] = 0.95,
    seed: Annotated[
        int, typer.Option(min=0, help="The same seed gives the same text, whatever it is generated beside.")
    ] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Continue so many prompts side by side.")] = 16,
    step: Annotated[int | None, typer.Option(min=1, help="Checkpoint to use; default: the newest.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The SentencePiece model, if it is not where the run's configuration says.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON per prompt.")] = False,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks to start on this machine, each with a part of the model.")
    ] = None,
) -> None:
    """Sample text from a trained run.

    It runs in one process, on the GPU if there is one; with --ranks, or under torchrun, deepspeed or srun (python -m
    megatron_stable generate ...), each rank loads and computes its own part of the model.

    Example:
      megatron-stable generate runs/first --prompt 'def ' --tokens 100 --temperature 0.7
      megatron-stable generate runs/first --prompt 'import' --prompt 'class' --temperature 0 --json
      megatron-stable generate runs/30b --ranks 8 parallel.tensor=8 --prompts prompts.jsonl
    """
    Sampling(temperature, top_p, seed)  # refuses what is out of range, before anything starts
    if prompt and prompts is not None:
        raise ConfigError("--prompt and --prompts exclude each other: put all prompts into the file")
    asked = read_prompts(prompts) if prompts is not None else [Prompt(text) for text in prompt or [""]]
    if ranks is not None:
        raise on_ranks(context, ranks)
    say = _print_json if as_json else _print

    def work(tell: Tell = lambda error: None) -> int:
        with joined(tell) as lifeline:
            if lifeline is None and overrides:
                raise ConfigError(f"{overrides[0]}: one process has no layout; give --ranks N")
            if lifeline is None:
                trained = open_run(run, step, tokenizer)
            else:
                trained = open_on_ranks(run, step, tokenizer, lifeline, overrides or [], replicas=False)
            todo, number = iter(asked), 0
            while some := list(islice(todo, batch)):
                samplings = [Sampling(temperature, top_p, seed if one.seed is None else one.seed) for one in some]
                stream = generate_each(trained, [one.text for one in some], tokens, samplings)
                if trained.ranks.first:
                    say(run, trained, some, tokens, stream, number, len(asked))
                else:
                    for _ in stream:
                        pass
                number += len(some)
        return 0

    if several():
        raise as_rank(work)
    work()


def _print(
    run: Path,
    trained: Trained,
    prompts: list[Prompt],
    tokens: int,
    stream: Iterator[tuple[int, int]],
    number: int,
    total: int,
) -> None:
    """The text as it comes, if there is one prompt; of several, one after the other."""
    tokenizer = need_tokenizer(trained)
    if total == 1:
        typer.echo(prompts[0].text, nl=False)
        for piece in text_pieces(tokenizer, prompts[0].text, (token for _, token in stream)):
            typer.echo(piece, nl=False)
            sys.stdout.flush()
        typer.echo()
        return
    for i, (one, ids) in enumerate(zip(prompts, _gathered(stream, len(prompts)), strict=True), start=number + 1):
        typer.echo(f"--- {i} of {total}")
        typer.echo(one.text + "".join(text_pieces(tokenizer, one.text, ids)))


def _print_json(
    run: Path,
    trained: Trained,
    prompts: list[Prompt],
    tokens: int,
    stream: Iterator[tuple[int, int]],
    number: int,
    total: int,
) -> None:
    tokenizer = need_tokenizer(trained)
    for one, ids in zip(prompts, _gathered(stream, len(prompts)), strict=True):
        facts: dict[str, Any] = {
            "run": str(run),
            "step": trained.step,
            "prompt": one.text,
            "text": "".join(text_pieces(tokenizer, one.text, ids)),
            "tokens": len(ids),
            "ended": "length" if len(ids) == tokens else "end_of_document",
        }
        typer.echo(json.dumps(facts))


def _gathered(stream: Iterator[tuple[int, int]], prompts: int) -> list[list[int]]:
    ids: list[list[int]] = [[] for _ in range(prompts)]
    for number, token in stream:
        ids[number].append(token)
    return ids
