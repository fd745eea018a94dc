"""TensorBoard itself, in a browser: what opens, and what is drawn."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from math import exp
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from megatron_stable.config.schema import Config
from megatron_stable.records.callbacks import Callbacks
from megatron_stable.records.hparams import HParams
from megatron_stable.records.metrics import Record
from megatron_stable.records.tensorboard import TensorBoard
from megatron_stable.stability.events import Rollback, Spike
from megatron_stable.stability.probes import PROBES, places
from tests.harness.browser import Browser

LAYERS = 2
# so many charts have lines
DRAWN = """wanted => {
    const within = (root, name) => [...root.querySelectorAll("*")].flatMap(
        node => [...(node.matches(name) ? [node] : []), ...(node.shadowRoot ? within(node.shadowRoot, name) : [])]);
    const charts = within(document, "tf-custom-scalar-multi-line-chart-card");
    const lined = charts.filter(chart => within(chart.shadowRoot, "path.line").some(line => line.getAttribute("d")));
    return charts.length === wanted && lined.length === wanted;
}"""
SPIKE = Spike(step=25, series="loss", value=9, level=2, scale=0.1, score=70, onset=25)
ROLLBACK = Rollback(step=25, id="a", by="guard", rule="divergence", rollback_to=20, windows=((25, 25),))


def record(step: int, rate: float) -> Record:
    loss = 5 - step / 20
    values: Record = {"step": step, "loss": loss, "grad_norm": 1 / step, "learning_rate": rate, "loss_scale": 1.0}
    if step % 10 == 0:
        measured = (where for probe in PROBES.values() for where in places(probe, LAYERS))
        values |= {where.tag: 1 + (where.layer or 0) + step / 50 for where in measured}
        values |= {"validation_loss": loss, "validation_perplexity": exp(loss)}
    return values


def write_run(folder: Path, rate: float) -> None:
    """A run of 40 steps that went back once."""
    config = Config.model_validate({"run": {"steps": 40}, "optimizer": {"learning_rate": rate}})
    board = folder / "tensorboard"
    callbacks = Callbacks(TensorBoard(board, 1, config), HParams(board / "hparams", config))
    for first, last in ((1, 25), (21, 40)):
        for step in range(first, last + 1):
            callbacks.record(record(step, rate))
        if last == 25:
            callbacks.event(SPIKE)
            callbacks.event(ROLLBACK)
            callbacks.rewind(20)
    callbacks.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a TensorBoard that shows two runs."""
    folder = tmp_path_factory.mktemp("board")
    for name, rate in (("low", 1e-3), ("high", 3e-3)):
        write_run(folder / "runs" / name, rate)
    log = folder / "log"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder / "runs"), "--port", "0"]
    with log.open("w") as said:
        process = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=said, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield found[0]
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def test_custom_scalars_opens_on_what_tells_whether_a_run_is_stable(server: str, browser: Browser) -> None:
    with browser.visit(f"{server}#custom_scalars") as visit:
        visit.page.wait_for_function(DRAWN, arg=9)
        norms = [f"output norm: {name} by layer" for name in ("QKV", "Proj", "FC1", "FC2")]
        for title in ("loss", "gradient norm", "events", "learning rate", "attention, max logit by layer", *norms):
            visit.page.get_by_text(title, exact=True).wait_for()
        assert visit.page.get_by_text("Matches (4)").count() == 1 + len(norms) + 1  # two layers of two runs; two losses
        assert visit.problems == []
        assert [url for url in visit.requested if not url.startswith((server, "data:", "blob:"))] == []


def test_text_and_hparams_tell_of_both_runs(server: str, browser: Browser) -> None:
    with browser.visit(f"{server}#text") as visit:
        for event in (SPIKE, ROLLBACK):
            visit.page.get_by_text(event.sentence()).first.wait_for()
        visit.page.goto(f"{server}#hparams")
        for cell in ("low/tensorboard/hparams", "high/tensorboard/hparams", "optimizer.learning_rate", "final/loss"):
            visit.page.locator("tf-hparams-table-view").get_by_text(cell).first.wait_for()
        assert visit.problems == []


def test_the_server_shows_a_rollback_where_the_curve_begins_anew(server: str) -> None:
    query = urlencode({"run": "low/tensorboard", "tag": "events/rollback"})
    with urlopen(f"{server}data/plugin/scalars/scalars?{query}", timeout=20) as answer:
        pulse = {step: value for _, step, value in json.load(answer)}
    assert pulse == {20: 0, 21: 1} | dict.fromkeys(range(22, 41), 0)
