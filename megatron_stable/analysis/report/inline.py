"""A figure's SVG as part of a page: its colours become the page's, its numbers and pictures as short as they can be."""

from __future__ import annotations

import io
import re
from base64 import b64decode, b64encode
from html import escape

from megatron_stable.analysis.drawing import COLORS, GRID, HOLE, INK, MUTED, PAPER

# the page's names of the colours that figures are drawn with
NAMES = {INK: "ink", MUTED: "muted", GRID: "grid", HOLE: "hole", PAPER: "paper"} | {
    color: f"line-{number}" for number, color in enumerate(COLORS) if color != INK
}
COLOR = re.compile("|".join(NAMES))
ROOT = re.compile(r"<svg[^>]*viewBox=\"([^\"]+)\"[^>]*>")
UNUSED = re.compile(r"<defs>\s*<style.*?</style>\s*</defs>|<metadata>.*?</metadata>|<!--.*?-->", re.DOTALL)
FONT = re.compile(r" ?font-family: [^;\"]*;?")
PATH = re.compile(r' (d|x|y|points)="([^"]*)"')
DECIMALS = re.compile(r"-?\d+\.\d+")
PICTURE = re.compile(r"data:image/png;base64,\s*([A-Za-z0-9+/=\s]+)")
PALETTE = 128  # colours of a picture: its map has 64, and some are no value's


def inline(svg: str, name: str, label: str) -> str:
    """An ``<svg>`` for a page.

    Args:
        svg: As :func:`megatron_stable.analysis.drawing.svg` makes it.
        name: No other figure's on the page: its ids begin with it.
        label: Its accessible name.
    """
    root = ROOT.search(svg)
    assert root is not None
    size, body = root[1], UNUSED.sub("", svg[root.end() :])
    body = COLOR.sub(lambda found: f"var(--{NAMES[found[0]]})", FONT.sub("", body))
    used = set(re.findall(r"#([\w.-]+)[\")]", body))
    body = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r"#([\w.-]+)([\")])", rf"#{name}-\1\2", body)
    body = PATH.sub(lambda found: f' {found[1]}="{_short(found[2])}"', body)
    body = PICTURE.sub(lambda found: f"data:image/png;base64,{_palette(found[1])}", body)
    body = _flat(re.sub(r">\s+<", "><", body))
    return f'<svg role="img" aria-label="{escape(label)}" viewBox="{size}">{body.strip()}'


def _short(path: str) -> str:
    """Coordinates to a tenth of a point; after a move, lines need no letter."""
    path = DECIMALS.sub(lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), " ".join(path.split()))
    return path.replace(" L ", " ")


def _flat(body: str) -> str:
    """Without groups that say nothing: a browser, and what looks for faults in a page, is slower by each."""
    kept: list[bool] = []

    def keep(tag: re.Match[str]) -> str:
        if tag[0] == "</g>":
            return tag[0] if kept.pop() else ""
        kept.append(tag[0] != "<g>")
        return tag[0] if kept[-1] else ""

    return re.sub(r"<g(?: [^>]*)?>|</g>", keep, body)


def _palette(picture: str) -> str:
    """A PNG, as base64, with a palette in place of four bytes a pixel."""
    from PIL import Image

    written = io.BytesIO()
    image = Image.open(io.BytesIO(b64decode(picture)))
    image.quantize(PALETTE, Image.Quantize.FASTOCTREE).save(written, "PNG", optimize=True)
    return b64encode(written.getvalue()).decode()
