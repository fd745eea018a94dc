"""A real browser, Debian's Chromium without a window: pages as a reader sees them, and what is wrong with them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser as Chromium
    from playwright.sync_api import BrowserContext, ConsoleMessage, Page, Request, Response

PATIENCE = 20_000  # milliseconds that an action, or an expectation, waits
NAMES = ("chromium", "chromium-browser", "google-chrome")

# what has the focus, as a reader would name it, and whether it shows
FOCUSED = """() => {
    const element = document.activeElement;
    if (!element || element === document.body || element === document.documentElement) return null;
    const label = element.labels && element.labels.length ? element.labels[0].innerText : "";
    const name = element.getAttribute("aria-label") || label || element.innerText || element.value || "";
    const style = getComputedStyle(element);
    const outline = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0;
    const first = !element.hasAttribute("data-walked");
    element.setAttribute("data-walked", "");
    return {what: element.tagName.toLowerCase(), name: name.trim().replace(/\\s+/g, " ").slice(0, 60),
            shows: outline || style.boxShadow !== "none", first};
}"""


class Focus(NamedTuple):
    """An element that has the focus: its tag, its name, and whether an outline or a shadow shows it."""

    what: str
    name: str
    shows: bool


@dataclass
class Visit:
    """A page that is open, and what went wrong on it so far."""

    page: Page
    errors: list[str] = field(default_factory=list)
    """What it wrote to the console as errors."""
    raised: list[str] = field(default_factory=list)
    """Exceptions that nobody caught."""
    failed: list[str] = field(default_factory=list)
    """Requests without an answer, or with one of status 400 or more."""
    requested: list[str] = field(default_factory=list)
    """URLs of all requests, the page's own first."""

    def __post_init__(self) -> None:
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.raised.append(str(error)))
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.on("requestfailed", self._failed)
        self.page.on("response", self._response)

    @property
    def problems(self) -> list[str]:
        """All that went wrong; empty: nothing."""
        return [*self.errors, *self.raised, *self.failed]

    def media(self, scheme: str = "light", media: str = "screen") -> None:
        """Show the page as it is with ``light`` or ``dark`` colours preferred, on a ``screen`` or in ``print``."""
        self.page.emulate_media(color_scheme=scheme, media=media)  # type: ignore[arg-type]

    def violations(self, *rules: str) -> list[str]:
        """What axe-core finds that keeps people from reading or using the page: contrast, names, order, keyboard.

        Args:
            rules: Those to look at, by their ids; all without any.
        """
        from axe_playwright_python.sync_playwright import Axe

        options: dict[str, Any] = {"runOnly": {"type": "rule", "values": [*rules]}} if rules else {}
        found = Axe().run(self.page, options=options).response["violations"]
        return [
            f"{rule['id']} ({rule['impact']}): {rule['help']}: {node['html'][:120]}"
            for rule in found
            for node in rule["nodes"]
        ]

    def walk(self, most: int = 200) -> list[Focus]:
        """What gets the focus, one Tab after another from the page's beginning, once around."""
        self.page.evaluate("document.body.tabIndex = -1; document.body.focus()")
        self.page.evaluate("document.body.removeAttribute('tabindex')")
        walked: list[Focus] = []
        for _ in range(most):
            self.page.keyboard.press("Tab")
            focused = self.page.evaluate(FOCUSED)
            if focused is None or not focused["first"]:
                break
            walked.append(Focus(focused["what"], focused["name"], focused["shows"]))
        self.page.evaluate("document.querySelectorAll('[data-walked]').forEach(e => e.removeAttribute('data-walked'))")
        return walked

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def _failed(self, request: Request) -> None:
        self.failed.append(f"{request.url}: {request.failure}")

    def _response(self, response: Response) -> None:
        if response.status >= 400:
            self.failed.append(f"{response.url}: {response.status}")


class Browser:
    """Opens pages, each in a profile of its own."""

    def __init__(self, chromium: Chromium) -> None:
        self.chromium = chromium

    @contextmanager
    def visit(self, where: str | Path, scheme: str = "light", width: int = 1280, height: int = 900) -> Iterator[Visit]:
        """A page by its URL or its file, when it has loaded; see :meth:`Visit.media` for ``scheme``."""
        context: BrowserContext = self.chromium.new_context(
            color_scheme=scheme,  # type: ignore[arg-type]
            viewport={"width": width, "height": height},
        )
        context.set_default_timeout(PATIENCE)
        try:
            visit = Visit(context.new_page())
            visit.page.goto(where.resolve().as_uri() if isinstance(where, Path) else where)
            yield visit
        finally:
            context.close()


@contextmanager
def browsing() -> Iterator[Browser]:
    """A browser; the test that wants it is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make setup")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no browser: apt install chromium")
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # which Chromium refuses to root
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=program, args=flags, timeout=2 * PATIENCE)
        try:
            yield Browser(chromium)
        finally:
            chromium.close()
