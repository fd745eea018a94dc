"""`megatron-stable generate`: text from a trained run."""

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from megatron_stable.analysis.generation import Sampling, generate_each, need_tokenizer, text_pieces
from megatron_stable.analysis.prompts import Prompt, read_prompts
from megatron_stable.analysis.ranks import joined, several
from megatron_stable.analysis.trained import open_on_ranks, open_run
from megatron_stable.commands.again import as_rank, on_ranks, said_once
from megatron_stable.errors import ConfigError
from megatron_stable.parallel import agreement
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
    with said_once():
        Sampling(temperature, top_p, seed)  # refuses what is out of range, before anything starts
        if prompt and prompts is not None:
            raise ConfigError("--prompt and --prompts exclude each other: put all prompts into the file")
    if ranks is not None:
        raise on_ranks(context, ranks)

    def work(tell: Tell = lambda error: None) -> int:
        with joined(tell) as lifeline:
            if lifeline is None and overrides:
                raise ConfigError(f"{overrides[0]}: one process has no layout; give --ranks N")
            if lifeline is None:
                asked, trained = _asked(prompt, prompts), open_run(run, step, tokenizer)
            else:  # whose machines may not all have the file, or the same
                asked = agreement.decided(lambda: _asked(prompt, prompts))
                trained = open_on_ranks(run, step, tokenizer, lifeline, overrides or [], replicas=False)
            with trained.ranks.together():
                encoded = need_tokenizer(trained)
            for start in range(0, len(asked), batch):
                some = asked[start : start + batch]
                samplings = [Sampling(temperature, top_p, seed if one.seed is None else one.seed) for one in some]
                with trained.ranks.together():
                    stream = generate_each(trained, [one.text for one in some], tokens, samplings)
                if trained.ranks.first and len(asked) == 1 and not as_json:
                    _print_as_it_comes(
                        asked[0].text, text_pieces(encoded, asked[0].text, (token for _, token in stream))
                    )
                    continue
                for i, (one, ids) in enumerate(zip(some, _gathered(stream, len(some)), strict=True), start + 1):
                    text = "".join(text_pieces(encoded, one.text, ids))
                    if trained.ranks.first and as_json:
                        ended = "length" if len(ids) == tokens else "end_of_document"
                        facts = {"run": str(run), "step": trained.step, "prompt": one.text, "text": text}
                        typer.echo(json.dumps({**facts, "tokens": len(ids), "ended": ended}))
                    elif trained.ranks.first:
                        typer.echo(f"--- {i} of {len(asked)}\n{one.text}{text}")
        return 0

    if several():
        as_rank(work)
    work()


def _asked(given: list[str] | None, file: Path | None) -> list[Prompt]:
    return read_prompts(file) if file is not None else [Prompt(text) for text in given or [""]]


def _print_as_it_comes(prompt: str, pieces: Iterable[str]) -> None:
    for piece in chain([prompt], pieces):
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()


def _gathered(stream: Iterator[tuple[int, int]], prompts: int) -> list[list[int]]:
    ids: list[list[int]] = [[] for _ in range(prompts)]
    for number, token in stream:
        ids[number].append(token)
    return ids
