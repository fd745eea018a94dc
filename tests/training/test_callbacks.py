"""Callbacks never end a run, whatever becomes of the numbers, the disk and the terminal."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_stable.config.schema import Config
from megatron_stable.records.directory import RunDirectory
from megatron_stable.records.ledger import append_line, read_lines
from megatron_stable.stability.interventions import Intervention, Interventions
from megatron_stable.training.callbacks import Callbacks, MetricsFile, ProgressLine, TensorBoard, duration, strict
from megatron_stable.training.watch import Watch

RECORD: dict[str, Any] = {"step": 1, "loss": 2.5, "grad_norm": 0.5, "tokens_per_second": None, "skipped": False}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_does_not_have_are_null(value: float) -> None:
    assert strict(value) is None
    assert strict(2.5) == 2.5


def test_a_diverged_run_still_has_a_progress_line(capsys: pytest.CaptureFixture[str]) -> None:
    record = {**RECORD, "loss": None, "grad_norm": None, "validation_loss": None, "skipped": True}
    ProgressLine(Config()).record(record)
    line = capsys.readouterr().out
    assert "loss not finite · validation not finite · grad norm not finite · update dropped" in line


def test_nobody_needs_to_read_the_progress_line(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w", closefd=False))
    line = ProgressLine(Config())
    line.record(RECORD)
    line.message("done")
    line.close()
    monkeypatch.undo()
    os.close(write)


def test_what_cannot_be_written_is_reported_once_until_it_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.mkdir()
    callbacks = Callbacks(MetricsFile(path), ProgressLine(Config()))
    callbacks.record(RECORD)
    callbacks.record(RECORD)
    assert capsys.readouterr().out.count("warning: MetricsFile cannot write, training goes on") == 1
    path.rmdir()
    callbacks.record(RECORD)
    assert read_lines(path) == [RECORD]
    path.unlink()
    path.mkdir()
    callbacks.record(RECORD)
    assert "MetricsFile cannot write" in capsys.readouterr().out


def test_a_line_that_a_crash_cut_off_stays_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    append_line(path, {"step": 2})
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
    assert path.read_text().splitlines()[1] == '{"step": 2, "lo'


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3599.9, "1:00:00"), (90061, "25:01:01")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_run_that_went_back_writes_over_what_it_left(tmp_path: Path) -> None:
    writer = TensorBoard(tmp_path, 1)
    for step, loss in [(1, 3.0), (2, 2.0), (3, 9.0), (4, 9.5)]:
        writer.record({"step": step, "loss": loss})
    writer.rewind(2)
    writer.record({"step": 4, "loss": 1.0})  # not every step is recorded
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 3.0), (2, 2.0), (4, 1.0)]


def test_going_back_outlives_a_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    class Full(MetricsFile):
        def rewind(self, step: int) -> None:
            raise OSError(28, "No space left on device")

    Callbacks(Full(Path("nowhere")), ProgressLine(Config())).rewind(2)
    assert "training goes on" in capsys.readouterr().out


def test_the_ledger_is_told_of_a_repair_that_a_crash_kept_out_of_it(tmp_path: Path) -> None:
    directory, said = RunDirectory(tmp_path), []
    watch = Watch(Config(), directory, said.append, rank=0)
    repair = Intervention(
        id="a", time="2026-01-01T00:00:00+00:00", by="guard", rule="divergence", rollback_to=3, windows=((4, 9),)
    )
    watch.interventions = Interventions((repair,))
    watch.catch_up(3)
    watch.catch_up(3)
    (event,) = directory.ledger.read()
    assert (event["event"], event["id"], event["windows"]) == ("rollback", "a", [[4, 9]])
    assert len(said) == 1 and "4-9" in directory.logbook.read_text()
