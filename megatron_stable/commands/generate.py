"""`megatron-stable generate`: text from a trained run."""

import json
from pathlib import Path
from typing import Annotated

import typer

from megatron_stable.analysis.generation import Sampling, need_tokenizer, text_pieces
from megatron_stable.analysis.generation import generate as continuation
from megatron_stable.analysis.trained import open_run


def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "",
    tokens: Annotated[
        int, typer.Option(min=1, help="Generate at most this many tokens; a document may end earlier.")
    ] = 200,
    temperature: Annotated[
        float, typer.Option(help="0 always takes the most probable token; 1 samples from the model's distribution.")
    ] = 0.8,
    top_p: Annotated[
        float, typer.Option(help="Sample from the most probable tokens that together have this probability.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 0,
    step: Annotated[int | None, typer.Option(min=1, help="Checkpoint to use; default: the newest.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The SentencePiece model, if it is not where the run's configuration says.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Sample text from a trained run.

    It runs in one process, on the GPU if there is one.

    Example:
      megatron-stable generate runs/first --prompt 'def ' --tokens 100 --temperature 0.7
      megatron-stable generate runs/first --prompt 'import' --temperature 0 --json
    """
    sampling = Sampling(temperature, top_p, seed)
    trained = open_run(run, step, tokenizer)
    ids: list[int] = []

    def counted(token: int) -> int:
        ids.append(token)
        return token

    stream = map(counted, continuation(trained, prompt, tokens, sampling))
    pieces = text_pieces(need_tokenizer(trained), prompt, stream)
    if as_json:
        text = "".join(pieces)
        ended = "length" if len(ids) == tokens else "end_of_document"
        facts = {
            "run": str(run),
            "step": trained.step,
            "prompt": prompt,
            "text": text,
            "tokens": len(ids),
            "ended": ended,
        }
        typer.echo(json.dumps(facts))
        return
    typer.echo(prompt, nl=False)
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()
