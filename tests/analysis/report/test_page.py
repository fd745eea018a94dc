"""The page of a report in a real browser, and what it holds whatever a run's files say."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from megatron_stable.analysis.drawing import svg
from megatron_stable.analysis.report.inline import inline
from megatron_stable.analysis.report.inside import draw_probes, probe_charts
from megatron_stable.analysis.report.page import render
from megatron_stable.analysis.report.run import open_runs
from megatron_stable.analysis.report.scalars import scalar_charts
from megatron_stable.analysis.report.style import DARK, LIGHT
from megatron_stable.errors import ConfigError, DataError
from megatron_stable.stability.events import Drop, FlightRecorded, GaveUp, Rollback, Spike
from megatron_stable.stability.probes import PROBES
from tests.analysis.report.made import make_run, probes, record
from tests.harness.browser import Browser

STEPS = 40
EVENTS = (
    Spike(step=12, series="loss", value=5.4, level=3.5, scale=0.1, score=12.0, onset=11),
    Drop(step=12, rule="spike", loss=5.4, grad_norm=None, consecutive=1, total=1, by="guard"),
    FlightRecorded(step=12, file="flight/step_00000012.jsonl", first=2, last=12),
    Rollback(
        step=14, id="1", by="guard", rule="divergence", onset=11, rollback_to=10, windows=((11, 14),),
        samples=((88, 120),), reason="the loss rose",
    ),
    GaveUp(step=40, by="guard", rule="divergence", onset=39, reason="gave up"),
)  # fmt: skip
HOSTILE = "<img src=x onerror=alert(1)>\"'</script><script>alert(2)</script>"
BOXES = """() => [...document.querySelectorAll("figure svg")].map(svg => {
    const box = svg.getBoundingClientRect(); return [svg.getAttribute("aria-label"), box.width, box.height]; })"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything: probes at every second step, a rollback, a file of the flight recorder."""
    records = [record(step, loss=9.0) for step in range(11, 15)]  # superseded
    records += [record(step) | (probes(step) if step % 2 == 0 else {}) for step in range(1, STEPS + 1)]
    records[-1] |= {"validation_loss": 2.25, "validation_perplexity": 9.5}
    flight = [{"step": step, "attention/max_logit/layer_02": 2.0 ** max(0, step - 10)} for step in range(1, 20)]
    settings = ("logging.probes_every=2", f"run.steps={STEPS}", "schedule.warmup_steps=2")
    path = tmp_path_factory.mktemp("runs") / "first"
    return make_run(path, records, EVENTS, settings, {"step_00000019.jsonl": flight})


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    path = run / "report.html"
    path.write_text(render(open_runs([run])), encoding="utf-8")
    return path


def test_every_figure_shows_without_network_or_errors(browser: Browser, run: Path, page: Path) -> None:
    (opened,) = open_runs([run])
    charts = [*scalar_charts([opened]), *probe_charts([opened])]
    with browser.visit(page) as visit:
        visit.page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        boxes = visit.page.evaluate(BOXES)
        assert [label.partition(".")[0] for label, *_ in boxes] == [chart.title for chart in charts]
        assert all(width > 600 and height > 60 for _, width, height in boxes)
        assert visit.problems == []
        assert [url for url in visit.requested if not url.startswith("data:")] == [page.as_uri()]
        ids = visit.page.evaluate("[...document.querySelectorAll('[id]')].map(element => element.id)")
        assert len(ids) == len(set(ids))
        unresolved = visit.page.evaluate(
            "[...document.querySelectorAll('figure use')].filter(u => !document.querySelector(u.href.baseVal)).length"
        )
        assert unresolved == 0
    assert {probe.name for chart in charts for probe in getattr(chart, "probes", ())} == set(PROBES)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every kind of part, but few of each: axe takes its time over each element of a figure."""
    some = [
        record(step) | {tag: value for tag, value in probes(step, 2).items() if tag.startswith(("attention", "logits"))}
        for step in range(1, 21)
    ]
    run = make_run(tmp_path_factory.mktemp("runs") / "short", some, EVENTS)
    (run / "report.html").write_text(render(open_runs([run])), encoding="utf-8")
    return run / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_names_and_keyboard(browser: Browser, short: Path, scheme: str) -> None:
    with browser.visit(short, scheme=scheme) as visit:
        visit.page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert visit.violations() == []
        walked = visit.walk(400)
        assert all(focus.shows for focus in walked)
        names = [focus.name for focus in walked]
        assert names[0] == "Skip to the content" and "Summary" in names
        for name in ("Attention", "Loss, figure", "Attention: entropy", "spike (1)", "All fields"):
            assert name in names, name
        text, paper = (
            visit.page.evaluate(f"getComputedStyle(document.querySelector('{what}')).{which}")
            for what, which in (("figure svg text", "fill"), ("body", "backgroundColor"))
        )
        colors = LIGHT if scheme == "light" else DARK
        assert (text, paper) == (rgb(colors["ink"]), rgb(colors["paper"]))


def test_in_print_everything_is_open_and_light(browser: Browser, short: Path) -> None:
    with browser.visit(short, scheme="dark") as visit:
        visit.media("dark", "print")
        assert all(height > 60 for *_, height in visit.page.evaluate(BOXES))
        background = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == rgb(LIGHT["paper"])


def test_the_ledger_is_filtered_by_kind_without_a_script(browser: Browser, short: Path) -> None:
    assert "<script" not in short.read_text(encoding="utf-8")
    with browser.visit(short) as visit:
        rows = visit.page.locator("section[aria-labelledby=ledger-0] tbody tr:visible")
        assert rows.count() == len(EVENTS)
        visit.page.get_by_label("spike (1)").uncheck()
        assert rows.count() == len(EVENTS) - 1 and "spike of the loss" not in "".join(rows.all_inner_texts())


def test_lines_stand_out_from_the_ground_in_both_schemes() -> None:
    for colors in (LIGHT, DARK):
        for name, least in {"ink": 7, "muted": 4.5, "link": 4.5, **{f"line-{i}": 3 for i in range(4)}}.items():
            assert contrast(colors[name], colors["paper"]) >= least, (name, colors[name])
        assert contrast(colors["ink"], colors["raised"]) >= 7


def test_what_happened_is_told(run: Path, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for event in open_runs([run])[0].events:
        assert event.sentence().replace("'", "&#x27;") in text
    assert "attention/max_logit at layer 2: from 1 to 512, × 512, since step 11" in text
    assert "grey lines are steps that the run went back behind" in text
    assert "2.25 the last time" in text and "11–14" in text


def test_two_runs_share_the_page(tmp_path: Path) -> None:
    tags = ("attention/max_logit/layer_00", "weight_norm/head", "noise_scale")
    measured = {tag: value for tag, value in probes(1, 1).items() if tag in tags}
    run = make_run(tmp_path / "first", [record(step) | measured for step in (1, 2, 3)], EVENTS, ["logging.every=2"])
    other = make_run(tmp_path / "other", [record(1), record(2)], settings=["optimizer.learning_rate=0.25"])
    text = render(open_runs([run, other]))
    differing = re.search(r'aria-label="What differs">(.*?)</table>', text)
    assert differing is not None and "optimizer.learning_rate" in differing[1] and "0.25" in differing[1]
    assert "logging.every" not in differing[1]
    assert "Ledger of first" in text and "Ledger of other" in text
    twin = make_run(tmp_path / "deep" / "first", [record(1)])
    assert [opened.name for opened in open_runs([run, twin])] == [str(run), str(twin)]


def test_what_files_say_is_never_markup(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a<b>&'\"$x$", [record(1, **{HOSTILE: 1.0, "$\\frac$": 2.0}), record(2)])
    run.joinpath("ledger.jsonl").write_text(
        '{"event": "<b>bold</b>", "step": 1, "time": "<i>", "what": "<img src=x>"}\n{"step": "<u>", "event": null}\n'
    )
    page = tmp_path / "page.html"
    page.write_text(render(open_runs([run])), encoding="utf-8")
    with browser.visit(page) as visit:
        assert visit.page.locator("main img, main script, main b, main i, main u").count() == 0
        assert visit.page.title() == "a<b>&'\"$x$ · report"
        assert "<b>bold</b>" in visit.page.inner_text("main")
        assert visit.problems == [] and [unquote(url) for url in visit.requested if url.startswith("http")] == []


def test_missing_pieces_are_normal(tmp_path: Path) -> None:
    run = make_run(tmp_path / "bare", [{"step": 3, "loss": None}])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    text = render(open_runs([run]))
    for words in ("The ledger has no entry", "It has written nothing", "nothing inside the model was measured", "3 of"):
        assert words in text
    assert "not finite at the last step, never finite at its lowest" in text


def test_no_run_and_no_step_are_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        open_runs([tmp_path])
    run = make_run(tmp_path / "empty", [])
    with pytest.raises(DataError, match="recorded no step yet"):
        open_runs([run])
    assert not open_runs([run], empty=True)[0].curves.step


def test_a_row_of_a_figure_of_many_layers_is_small(tmp_path: Path) -> None:
    """All rows of a long run are as large as this one: from 512 steps on, a chart is full."""
    tags = [tag for tag in probes(1, 48) if tag.startswith("attention/max_logit")]
    noise = np.random.default_rng(0).lognormal(size=(1024, 48)).tolist()
    records = [{"step": i + 1, **dict(zip(tags, values, strict=True))} for i, values in enumerate(noise)]
    (run,) = open_runs([make_run(tmp_path / "run", records)])
    (chart,) = probe_charts([run])
    size = len(inline(svg(draw_probes(chart, [run])), "a", "b"))
    rows = sum(len(probe.points or (1,)) + bool(probe.outside) for probe in PROBES.values())
    assert size * rows < 4.5e6, f"{size} bytes for each of {rows} rows"


def rgb(color: str) -> str:
    return f"rgb({', '.join(str(int(color[i : i + 2], 16)) for i in (1, 3, 5))})"


def contrast(one: str, other: str) -> float:
    """Of two colours, as WCAG 2 defines it."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_what_the_flight_recorder_wrote_last_comes_last_also_after_a_rollback(tmp_path: Path) -> None:
    rows = [{"step": step, "logits/mean": 1.0} for step in range(1, 4)]
    files = ("step_00000030.jsonl", "step_00000012.jsonl")
    events = [
        FlightRecorded(step=int(file[5:13]), file=f"flight/{file}", first=1, last=int(file[5:13])) for file in files
    ]
    run = make_run(tmp_path / "run", [record(1)], events, {}, dict.fromkeys(files, rows))
    (found,) = open_runs([run])
    assert [flight.path.name for flight in found.flights] == list(files)
