"""`megatron-stable report`: a page, and figures, of what a run's directory says."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_stable.analysis.report.figures import figures as draw
from megatron_stable.analysis.report.figures import write_figures
from megatron_stable.analysis.report.page import render
from megatron_stable.analysis.report.run import open_runs
from megatron_stable.analysis.report.watch import Watch
from megatron_stable.errors import ConfigError
from megatron_stable.files import write_file

PORT = 8321


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of runs, to be laid side by side.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="The page to write; default: RUN/report.html, of one run.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write each figure there too, as NAME.svg and NAME.png.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve the page on this machine, and make it anew as the run goes on.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of --watch; 0: one that is free.")] = PORT,
) -> None:
    """Make one HTML page of a run: loss with events, what was measured in each layer, speed, ledger, configuration.

    The page needs no other file, no script and no network, and shows runs in progress as well. Runs of any length are
    thinned so that no extreme is lost. docs/diagnostics.md says how to read each figure.

    Example:
      megatron-stable report runs/first
      megatron-stable report runs/first runs/second --output both.html --figures figures
      megatron-stable report runs/first --watch
    """
    if output is not None and watch:
        raise ConfigError("--watch serves the page and writes no file: leave out --output, or --watch")
    if figures is not None and watch:
        raise ConfigError("--watch serves the page and writes no file: leave out --figures, or --watch")
    if output is None and len(runs) > 1 and not watch:
        raise ConfigError("name the page of several runs with --output FILE.html")
    found = open_runs(runs, empty=watch)
    if figures is not None:
        written = write_figures(draw(found), figures)
        print(f"{figures}: {len(written)} files")
    if watch:
        _serve(Watch(found, port))
        return
    path = output or runs[0] / "report.html"
    data = render(found).encode()
    write_file(path, data)
    print(f"{path}: {len(data) / 1e6:.2f} MB")


def _serve(served: Watch) -> None:
    print(f"{served.address} · Ctrl-C ends it", flush=True)
    try:
        served.serve(lambda text: typer.echo(text, err=True))
    except KeyboardInterrupt:
        print("\nended")
