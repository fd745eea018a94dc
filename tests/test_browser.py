"""The browser that the tests of pages stand on sees what is wrong with a page."""

from pathlib import Path

import pytest

from tests.harness.browser import Browser, Focus

GOOD = """<!doctype html><html lang="en"><head><title>t</title><style>
body { background: rgb(255, 255, 255); color: black }
@media (prefers-color-scheme: dark) { body { background: rgb(0, 0, 0); color: white } }
@media print { body { background: rgb(255, 255, 0); color: black } }
button:focus { outline: 2px solid red }
</style></head><body><main><h1>Page</h1>
<a href="#x" style="outline: none; color: inherit">First</a> <button aria-label="Second">2</button>
<label>Third <input></label></main></body></html>"""

BAD = """<!doctype html><html lang="en"><head><title>t</title></head><body><main><h1>Page</h1>
<p style="color: #bbb; background: #fff">pale</p><img src="missing.png"><button></button></main>
<script>console.error("said"); setTimeout(() => { throw new Error("thrown") }, 0)</script></body></html>"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    page = tmp_path / "good.html"
    page.write_text(GOOD, encoding="utf-8")
    return page


def test_a_good_page_has_no_problems(browser: Browser, good: Path) -> None:
    with browser.visit(good) as visit:
        assert visit.problems == visit.violations() == []
        assert visit.requested == [good.as_uri()]


def test_what_is_wrong_with_a_page_is_found(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(BAD, encoding="utf-8")
    with browser.visit(page) as visit:
        visit.page.wait_for_timeout(100)
        assert "said" in visit.errors and visit.raised == ["thrown"]
        assert [url.rpartition("/")[2] for url in visit.failed] == ["missing.png: net::ERR_FILE_NOT_FOUND"]
        found = {violation.partition(" ")[0] for violation in visit.violations()}
        assert {"color-contrast", "image-alt", "button-name"} <= found
        assert len(visit.violations("image-alt")) == 1


def test_colours_follow_what_the_reader_prefers(browser: Browser, good: Path) -> None:
    with browser.visit(good, scheme="dark") as visit:

        def background() -> str:
            colour: str = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
            return colour

        seen = [background()]
        for scheme, media in (("light", "screen"), ("light", "print")):
            visit.media(scheme, media)
            seen.append(background())
        assert seen == ["rgb(0, 0, 0)", "rgb(255, 255, 255)", "rgb(255, 255, 0)"]


def test_a_walk_with_tab_meets_each_element_once(browser: Browser, good: Path) -> None:
    expected = [Focus("a", "First", False), Focus("button", "Second", True), Focus("input", "Third", True)]
    with browser.visit(good) as visit:
        assert visit.walk() == expected
        visit.page.focus("button")
        assert visit.walk() == expected  # from the beginning, again
