"""How pictures look: colours that colour-blind people tell apart, and canvases as PNG and SVG. Nothing keeps state."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil, floor, log10
from typing import Any

INK, MUTED, GRID, HOLE, PAPER = "#222222", "#595959", "#dedede", "#e9e9e9", "#ffffff"
# Okabe and Ito's, as far as they stand out from white by 3:1; lines differ in their dashes as well
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", INK)
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1.2)))
MAP = "cividis"  # perceptually uniform, and the same to all kinds of colour vision: Nuñez et al., PLOS ONE 13(7), 2018
DPI = 150


def style(number: int) -> dict[str, Any]:
    """Colour and dashes of a line, by its number from 0; the first 25 differ."""
    n = len(COLORS)
    return {"color": COLORS[number % n], "linestyle": DASHES[(number + number // n) % len(DASHES)]}


def canvas(width: float, height: float, **options: Any) -> Any:
    """An empty matplotlib figure, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import; no window, no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=PAPER, **options)
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Any) -> None:
    """A light grid, and no more frame than is needed."""
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(which="both", color=MUTED, labelcolor=INK)


def log_ticks(low: float, high: float, most: int = 5) -> tuple[list[float], list[str]]:
    """Round numbers between two positive ones, and what to call them; matplotlib's own take seconds to lay out."""
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        decades = range(floor(log10(low)), ceil(log10(high)) + 1)
        found = [digit * 10.0**decade for decade in decades for digit in digits]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) >= 3:
            break
    found = found[:: -(-len(found) // most)] if found else [low, high]
    return found, [f"{tick:g}" for tick in found]


def plain(text: str) -> str:
    """Text that matplotlib shows as it is: no formula, and no label that it would leave out."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def png(figure: Any, dpi: int = DPI) -> bytes:
    """The figure as PNG, the same for the same figure."""
    picture = io.BytesIO()
    with _settings():
        figure.savefig(picture, format="png", dpi=dpi, metadata={"Software": None})
    return picture.getvalue()


def svg(figure: Any) -> str:
    """The figure as SVG whose text is text, the same for the same figure."""
    picture = io.BytesIO()
    with _settings():
        figure.savefig(picture, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return picture.getvalue().decode()


@contextmanager
def _settings() -> Iterator[None]:
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "megatron-stable"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a browser has it, and PNG shows a box
        yield
