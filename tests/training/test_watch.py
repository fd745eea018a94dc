"""Early warnings of a run in progress: on record once, whatever becomes of the run in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_stable.config.load import load_config
from megatron_stable.records import jsonl
from megatron_stable.records.callbacks import Callback, Callbacks
from megatron_stable.records.chronicle import Chronicle
from megatron_stable.records.directory import RunDirectory
from megatron_stable.records.metrics_file import MetricsFile
from megatron_stable.stability.events import EarlyWarning, Event
from megatron_stable.training.watch import EarlyWarnings
from tests.harness.ranks import Ranks
from tests.training import runs

CONFIG = load_config(None, ["model.layers=1", "model.vocab_size=512", "run.steps=2000"])
LOGIT = "attention/max_logit/layer_00"


def record(step: int) -> dict[str, Any]:
    """Of a step in which logits grow tenfold every 300 steps: 10^3 at step 628."""
    return {"step": step, "data_step": step + 5, "learning_rate": 1e-3, LOGIT: 8.0 * 10 ** (step / 300)}


class Heard(Callback):
    """What was told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def event(self, event: Event) -> None:
        self.events.append(event)


def start(path: Path, step: int) -> tuple[Callbacks, Heard]:
    """What rank 0 of a run has when it starts behind a step."""
    directory, heard, callbacks = RunDirectory(path), Heard(), Callbacks()
    callbacks.callbacks += [Chronicle(directory), MetricsFile(directory.metrics), heard]
    callbacks.callbacks.append(EarlyWarnings(CONFIG, directory, callbacks, step))
    return callbacks, heard


def test_a_warning_goes_to_ledger_and_logbook_with_its_data_step(tmp_path: Path) -> None:
    callbacks, heard = start(tmp_path, 0)
    for step in range(10, 800, 10):
        callbacks.record(record(step))
    kinds = [(event.rule, event.kind) for event in heard.events if isinstance(event, EarlyWarning)]
    assert kinds[:2] == [("attention_logits", "ahead"), ("attention_logits", "past")]
    assert heard.events[0].data_step == heard.events[0].step + 5
    written = RunDirectory(tmp_path).ledger.read()
    assert [event.model_copy(update={"time": None}) for event in written] == heard.events
    assert "early warning: the largest attention logit of layer 0" in RunDirectory(tmp_path).logbook.read_text("utf-8")


@pytest.mark.parametrize("cut", [300, 520, 640])
def test_a_resumed_run_says_what_a_run_that_was_not_stopped_says(tmp_path: Path, cut: int) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    straight, heard = start(tmp_path / "a", 0)
    for step in range(10, 1200, 10):
        straight.record(record(step))
    said: list[Event] = []
    for first, last in ((10, cut), (cut, 1200)):
        callbacks, part = start(tmp_path / "b", first - 10)
        for step in range(first, last, 10):
            callbacks.record(record(step))
        said += part.events
    assert said == heard.events


def test_a_run_that_went_back_forgets_what_it_undid_and_repeats_nothing(tmp_path: Path) -> None:
    callbacks, heard = start(tmp_path, 0)
    for step in range(10, 700, 10):
        callbacks.record(record(step))
    before = list(heard.events)
    assert before
    callbacks.rewind(400)
    for step in range(410, 1500, 10):
        callbacks.record(record(step) | {LOGIT: 8.0 * 10 ** (400 / 300)})
    assert heard.events == before, "the steps that were undone do not count any more"
    callbacks.rewind(400)
    for step in range(410, 700, 10):
        callbacks.record(record(step))
    assert heard.events == before


def test_steps_that_come_again_count_once(tmp_path: Path) -> None:
    straight, heard = start(tmp_path, 0)
    for step in range(10, 1200, 10):
        straight.record(record(step))
    for path in tmp_path.iterdir():
        path.unlink()
    again, twice = start(tmp_path, 0)
    for step in range(10, 430, 10):
        again.record(record(step))
    assert not twice.events
    again.rewind(300)
    for step in range(310, 1200, 10):
        again.record(record(step))
    assert twice.events == heard.events


def test_the_tail_of_a_file_is_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert list(jsonl.tail(path, 100)) == []
    for number in range(50):
        jsonl.append(path, {"step": number})
    size = path.stat().st_size
    assert [value["step"] for value in jsonl.tail(path, size)] == list(range(50))
    assert [value["step"] for value in jsonl.tail(path, 2 * len('{"step": 49}\n'))] == [48, 49]
    assert [value["step"] for value in jsonl.tail(path, 2 * len('{"step": 49}\n') - 1)] == [49]
    with path.open("a") as file:
        file.write('{"step": 5')
    assert [value["step"] for value in jsonl.tail(path, 30)] == [49]


@pytest.mark.parametrize("on", [True, False])
def test_a_real_run_warns_unless_it_is_told_not_to(ranks: Ranks, tmp_path: Path, on: bool) -> None:
    runs.write_data(tmp_path / "data")
    settings = runs.settings(
        tmp_path, steps=4, parallel=runs.layout(tensor=2), optimizer={"eps": 1.0},  # no gradient is far above it
        logging={"probes_every": 1, "warnings": on},
    )  # fmt: skip
    assert ranks.run(2, runs.train, settings) == [0, 0]
    warnings = [event for event in RunDirectory(tmp_path / "run").ledger.read() if isinstance(event, EarlyWarning)]
    assert [(warning.rule, warning.kind, warning.step) for warning in warnings] == [("gradient_rms", "past", 2)] * on
    assert {layer for warning in warnings for layer in warning.layers} == {0, 1, 2, 3} if on else not warnings
