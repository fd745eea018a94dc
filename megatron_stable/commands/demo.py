"""`megatron-stable demo`: a first run, from text to a trained model, in minutes."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    directory: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo"),
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks that train, 2 if there is not just one GPU; even: with TP 2.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Remove what an earlier demo left there, and start anew.")
    ] = False,
) -> None:
    """A first run, offline: prepare text, train a tokenizer and a small model, show a sample and the curves.

    The text is the source of Python's standard library. A second call goes on with what the first has left.

    \b
    Example:
      megatron-stable demo
      megatron-stable demo --directory /tmp/demo --ranks 1 --fresh
    """
    from megatron_stable.training.demo import Demo
    from megatron_stable.training.launch import gpu_count

    raise typer.Exit(Demo(directory, ranks or min(2, gpu_count() or 2))(fresh))
