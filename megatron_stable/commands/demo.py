"""`megatron-stable demo`: a run that falls over and one that does not, in minutes."""

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
    """The same small model twice at a learning rate far too high, offline: as it is, and with qk_norm_cap.

    The first diverges: what the guard does about it, up to giving the run up with exit code 3, is what the demo shows,
    no failure of it. The second trains through. At the end: a sample, and a figure of both.

    The text is the source of Python's standard library. A second call goes on with what the first has left.

    \b
    Example:
      megatron-stable demo
      megatron-stable demo --directory /tmp/demo --ranks 1 --fresh
    """
    from megatron_stable.training.demo import Demo
    from megatron_stable.training.launch import gpu_count

    raise typer.Exit(Demo(directory, ranks or min(2, gpu_count() or 2))(fresh))
