"""`megatron-stable report`: a page, and figures, of what the directory of a run or of a sweep says."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from megatron_stable.analysis.report.figures import Drawn, write_figures
from megatron_stable.analysis.report.figures import figures as draw
from megatron_stable.analysis.report.page import render
from megatron_stable.analysis.report.run import open_runs
from megatron_stable.analysis.report.watch import Watch
from megatron_stable.errors import ConfigError
from megatron_stable.files import write_file
from megatron_stable.study.figures import figures as draw_sweep
from megatron_stable.study.page import render as render_sweep
from megatron_stable.study.reading import is_sweep, open_sweep

PORT = 8321


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Directories of runs, to be laid side by side; or a sweep, or its table."
        ),
    ],
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

    Of a sweep: loss against learning rate, LR sensitivity, the largest stable learning rate; see docs/sensitivity.md.

    Example:
      megatron-stable report runs/first
      megatron-stable report runs/first runs/second --output both.html --figures figures
      megatron-stable report runs/first --watch
      megatron-stable report sweeps/first --figures figures
    """
    if output is not None and output.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--output {output}: a report is a page; name it FILE.html (--figures DIR writes pictures)")
    if output is not None and watch:
        raise ConfigError("--watch serves the page and writes no file: leave out --output, or --watch")
    if figures is not None and watch:
        raise ConfigError("--watch serves the page and writes no file: leave out --figures, or --watch")
    if any(map(is_sweep, runs)):
        _report_sweep(runs, output, figures, watch)
        return
    if output is None and len(runs) > 1 and not watch:
        raise ConfigError("name the page of several runs with --output FILE.html")
    found = open_runs(runs, empty=watch)
    if figures is not None:
        _write_figures(draw(found), figures)
    if watch:
        _serve(Watch(found, port))
        return
    _write_page(render(found), output or runs[0] / "report.html")


def _report_sweep(paths: list[Path], output: Path | None, figures: Path | None, watch: bool) -> None:
    if len(paths) > 1:
        raise ConfigError("a page shows one sweep, or runs: name one sweep, or its runs, which are in its runs/")
    if watch:
        raise ConfigError("--watch is for runs: make the page of a sweep again as it goes on")
    (path,) = paths
    sweep = open_sweep(path)
    if figures is not None:
        _write_figures(draw_sweep(sweep), figures)
    _write_page(render_sweep(sweep), output or (path if path.is_dir() else path.parent) / "report.html")


def _write_figures(drawn: Iterable[Drawn], directory: Path) -> None:
    print(f"{directory}: {len(write_figures(drawn, directory))} files")


def _write_page(page: str, path: Path) -> None:
    data = page.encode()
    write_file(path, data)
    print(f"{path}: {len(data) / 1e6:.2f} MB")


def _serve(served: Watch) -> None:
    print(f"{served.address} · Ctrl-C ends it", flush=True)
    try:
        served.serve(lambda text: typer.echo(text, err=True))
    except KeyboardInterrupt:
        print("\nended")
