"""The page of a sweep, in a real browser and as text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_stable.errors import ConfigError, DataError
from megatron_stable.study.page import in_words, largest_in_words, render
from megatron_stable.study.reading import is_sweep, open_sweep
from megatron_stable.study.sensitivity import Estimate, Largest
from tests.analysis.report.made import make_run
from tests.harness.browser import Browser
from tests.study.made import RATES, run, sweep, write_sweep

HOSTILE = "<img src=x onerror=alert(1)>\"'</script><script>alert(2)</script>"


@pytest.mark.parametrize(("scheme", "rules"), [("light", ()), ("dark", ("color-contrast",))])
def test_it_can_be_read_and_used(browser: Browser, tmp_path: Path, scheme: str, rules: tuple[str, ...]) -> None:
    rows = sweep(sizes=["d64"], seeds=[1])
    rows[5].update(status="failed", reason=HOSTILE, score=None, loss=None, rise=None)
    page = write_sweep(tmp_path / "sweep", rows) / "report.html"
    page.write_text(render(open_sweep(page.parent)), encoding="utf-8")
    with browser.visit(page, scheme=scheme) as visit:
        visit.page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert visit.violations(*rules) == []
        assert visit.page.locator("figure svg").count() == 3
        assert visit.page.locator("main img, main script").count() == 0 and HOSTILE in visit.page.inner_text("main")
        names = [focus.name for focus in visit.walk(50)]
        assert names[0] == "Skip to the content" and "All 14 runs" in names
        assert visit.problems == []
        assert [url for url in visit.requested if not url.startswith("data:")] == [page.as_uri()]


def rows_of(page: str, name: str) -> list[list[str]]:
    """The cells of a table, by its accessible name."""
    found = re.search(rf'aria-label="{name}"><table>.*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    assert found is not None, name
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in found[1].split("</tr>")[:-1]]


def test_what_its_tables_say(tmp_path: Path) -> None:
    """A sweep in progress, in which one run failed."""
    rows = sweep(sizes=["d64", "d256"], seeds=[1, 3, 4])
    rows[5].update(status="failed", reason="killed", score=None, loss=None, rise=None)
    rows[-1].update(status="unfinished", score=None, loss=None, rise=None)
    text = render(open_sweep(write_sweep(tmp_path / "sweep", rows)))
    groups = {cells[0]: cells[1:] for cells in rows_of(text, "Groups, table")}
    assert groups["d256 · baseline"] == [
        "6,291,456", "3", "3.631", "0.003", "1.7 [1.29, 1.9]", "0.01 [0.01, 0.03]", "0.03",
    ]  # fmt: skip
    assert groups["d64 · baseline"][4:6] == ["≥ 0.46 (1 run missing)", "0.1 [3e-4, &gt; 0.3]"]
    assert groups["d256 · qk_norm"][5] == "≥ 0.3 [0.1, &gt; 0.3]"
    stable = {cells[0]: cells[1:] for cells in rows_of(text, "Stable runs at each learning rate, table")}
    assert stable["d256 · baseline"] == ["3 of 3"] * 4 + ["1 of 3"] + ["0 of 3"] * 2
    assert stable["d64 · baseline"][1] == "2 of 2"
    assert rows_of(text, "What hangs on the criterion, table")[-2] == ["pairs in the other order"] + ["0 of 5"] * 7
    assert dict(rows_of(text, "Summary, table"))["runs"] == "84, 72 finished, 10 diverged, 1 failed, 1 unfinished"
    assert "1 of 84 runs have not ended" in text and len(rows_of(text, "Runs, table")) == 84
    shared = dict(rows_of(text, "What all runs share, table"))
    assert shared["optimizer.eps"] == "1e-08" and "optimizer.learning_rate" not in shared


def test_remarks_on_the_grid(tmp_path: Path) -> None:
    rates = (0.001, 0.01, 0.02, 0.04)
    path = write_sweep(tmp_path / "a", [run(f"{rate}", rate, 9 if rate == 0.01 else 3) for rate in rates])
    text = render(open_sweep(path))
    assert "the widest step is 3.3 times the narrowest" in text and "Intervals need 3 seeds" in text
    assert "Stable again above a learning rate that diverged: all runs" in text
    path = write_sweep(tmp_path / "b", [run(f"{i}", 0.1, 3.0, recipe=str(i)) for i in range(2)])
    assert "There is one learning rate" in render(open_sweep(path))


def test_numbers_in_words() -> None:
    assert in_words(Estimate(0.26214, (0.2, 0.31), 0)) == "0.262 [0.2, 0.31]"
    assert in_words(Estimate(0.1, None, 2)) == "≥ 0.1 (2 runs missing)" and in_words(Estimate(None, None, 7)) == "–"
    for place, words in {
        (3, 3): "0.01", (-1, -1): "< 3e-4", (6, 7): "≥ 0.3", (2, 4): "≥ 0.003", (-1, 2): "≤ 0.003", (-1, 7): "–",
    }.items():  # fmt: skip
        assert largest_in_words(Largest(place, None, None, True), RATES) == words
    assert largest_in_words(Largest((3, 3), (-1, 7), None, True), RATES) == "0.01 [< 3e-4, > 0.3]"


def test_a_thousand_runs_make_a_small_page(tmp_path: Path) -> None:
    recipes = [f"recipe_{i}" for i in range(16)]
    rows = sweep(recipes=recipes, score=lambda size, recipe, rate, seed: 3 + rate * len(size) + seed / 100)
    assert len(rows) == 1008
    page = render(open_sweep(write_sweep(tmp_path / "sweep", rows)))
    assert len(page.encode()) < 3e6 and "<script" not in page


def test_what_is_no_sweep(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").touch()
    assert is_sweep(tmp_path) and is_sweep(Path("table.csv")) and not is_sweep(tmp_path / "elsewhere")
    assert not is_sweep(make_run(tmp_path / "run", []))
    with pytest.raises(DataError, match="no table yet"):
        open_sweep(tmp_path)
    with pytest.raises(ConfigError, match="must be a positive number"):
        open_sweep(write_sweep(tmp_path / "a", [run("a", -1.0, 3.0)]))
    with pytest.raises(ConfigError, match="score of the run a is 'x'"):
        open_sweep(write_sweep(tmp_path / "b", [run("a", 1.0, 3.0) | {"score": "x"}]))
