"""The figures of docs/diagnostics.md: two runs at a learning rate that one of them survives, laid side by side.

    python examples/diagnostics.py                 # trains both, a few minutes each on one core, and draws
    python examples/diagnostics.py --drawn-only    # draws again what was trained

Both have the demo's data and settings, but a guard that only watches, so that the charts show what happens to a model
whom nobody helps. Screenshots of the page and of TensorBoard need Chromium and playwright.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from megatron_stable.analysis.drawing import png
from megatron_stable.analysis.report.figures import figures
from megatron_stable.analysis.report.page import render
from megatron_stable.analysis.report.run import open_runs
from megatron_stable.commands.demo import prepare

GOOD, BAD = "qk_norm_cap", "baseline"
SETTINGS = ("run.steps=240", "guard.mode=watch", "logging.probes_every=2", "checkpoint.every=120")
SHOWN = (
    "loss", "gradient", "guard", "output_norm", "output_max", "attention_max_logit", "attention_entropy", "logits",
    "weight_norm", "grad_rms", "update_ratio", "moment_surprise", "noise_scale",
)  # fmt: skip
DPI, COLORS = 96, 96


def train(directory: Path) -> None:
    """Train both runs, as far as they are not there yet."""
    config = prepare(directory)
    for recipe in (GOOD, BAD):
        command = [
            sys.executable, "-m", "megatron_stable", "pretrain", "--config", str(directory / "config.yaml"),
            f"run.directory={directory / recipe}", f"model.recipe={recipe}",
            f"batch.micro_size={config.batch.global_size}", *SETTINGS,
        ]  # fmt: skip
        subprocess.run(command, check=True)


def draw(directory: Path, output: Path) -> Path:
    """Write the figures, as small PNGs, and the page; returns where the page is."""
    runs = open_runs([directory / GOOD, directory / BAD])
    for drawn in figures(runs):
        if drawn.name in SHOWN:
            save(png(drawn.picture, DPI), output / f"{drawn.name}.png")
    page = directory / "report.html"
    page.write_text(render(runs), encoding="utf-8")
    return page


def save(picture: bytes, path: Path) -> None:
    """Write a PNG with a palette, which is a third of its size."""
    import io

    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLORS).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


def photograph(page: Path, logs: Path, output: Path) -> None:
    """Screenshots of the page, in light and in dark, and of what TensorBoard makes of ``logs``."""
    from playwright.sync_api import sync_playwright
    from tensorboard.program import TensorBoard

    board = TensorBoard()
    board.configure(logdir=str(logs), host="127.0.0.1", port=0)
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        for scheme in ("light", "dark"):
            visit = browser.new_page(color_scheme=scheme, viewport={"width": 1200, "height": 800})  # type: ignore[arg-type]
            visit.goto(page.resolve().as_uri())
            visit.evaluate("document.getElementById('attention').scrollIntoView()")
            save(visit.screenshot(), output / f"report_{scheme}.png")
        visit = browser.new_page(viewport={"width": 1480, "height": 990})
        visit.goto(f"{board.launch()}#custom_scalars&_smoothingWeight=0")
        charts = visit.locator("tf-custom-scalar-multi-line-chart-card")
        charts.first.wait_for()
        for chart in charts.all():
            chart.locator("path.line").first.wait_for()
        save(visit.screenshot(), output / "tensorboard.png")
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("runs/diagnostics"))
    parser.add_argument("--output", type=Path, default=Path("docs/figures/diagnostics"))
    parser.add_argument("--drawn-only", action="store_true", help="train nothing")
    args = parser.parse_args()
    if not args.drawn_only:
        train(args.directory)
    page = draw(args.directory, args.output)
    print(f"{page}: {page.stat().st_size / 1e6:.2f} MB")
    photograph(page, args.directory / BAD / "tensorboard", args.output)


if __name__ == "__main__":
    main()
