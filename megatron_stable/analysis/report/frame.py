"""The frame of a page: HTML that needs no other file, no script and no network."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timezone
from html import escape
from typing import NamedTuple

from megatron_stable.analysis.drawing import svg
from megatron_stable.analysis.report.figures import Drawn
from megatron_stable.analysis.report.inline import inline
from megatron_stable.analysis.report.style import CSS
from megatron_stable.persisted import package_version

ICON = '<link rel="icon" href="data:,">'  # else a browser asks the server for one


class Section(NamedTuple):
    """A part of a page: the id of its heading, the heading, and what it holds, which is HTML."""

    anchor: str
    title: str
    content: str


def frame(name: str, sections: Iterable[Section], guide: str, head: str = "") -> str:
    """A whole page.

    Args:
        name: What the page is of.
        guide: The document that says how to read it.
        head: What else goes into the page's head.
    """
    parts = list(sections)
    contents = "".join(f'<li><a href="#{part.anchor}">{escape(part.title)}</a></li>' for part in parts)
    body = "".join(
        f'<section aria-labelledby="{part.anchor}"><h2 id="{part.anchor}">{escape(part.title)}</h2>{part.content}'
        "</section>"
        for part in parts
    )
    now = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="megatron-stable {escape(package_version())}">
<title>{escape(name)} · report</title>
{ICON}
<style>{CSS}</style>
{head}</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<header><h1>{escape(name)}</h1><p class="note">Made {now} by <code>megatron-stable report</code>.
{escape(guide)} says how to read each figure.</p></header>
<div class="layout">
<nav aria-label="Contents"><ol>{contents}</ol></nav>
<main id="content" tabindex="-1">
{body}
</main>
</div>
</body>
</html>
"""


def show(drawn: Drawn, folded: bool = False) -> str:
    """A figure with its heading and its caption."""
    picture = inline(svg(drawn.picture), drawn.name, f"{drawn.title}. {drawn.caption}")
    shown = (
        f'<figure><div class="wide" role="region" tabindex="0" aria-label="{escape(drawn.title)}, figure">{picture}'
        f"</div><figcaption>{escape(drawn.caption)}</figcaption></figure>"
    )
    heading = f"<h3>{escape(drawn.title)}</h3>"
    return f"<details><summary>{heading}</summary>{shown}</details>" if folded else f"{heading}{shown}"


def notes(texts: Iterable[str]) -> str:
    """What a reader should know of how the page was made."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<ul class="note">{items}</ul>' if items else ""
