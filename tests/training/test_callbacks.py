"""Callbacks never end a run, whatever becomes of the disk."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from megatron_stable.config.schema import Config
from megatron_stable.records.callbacks import Callback, Callbacks
from megatron_stable.records.metrics import Record, read_metrics
from megatron_stable.records.metrics_file import MetricsFile
from megatron_stable.training.progress import ProgressLine

RECORD: dict[str, Any] = {"step": 1, "loss": 2.5, "grad_norm": 0.5, "tokens_per_second": None, "skipped": False}


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
    assert list(read_metrics(path)) == [RECORD]
    path.unlink()
    path.mkdir()
    callbacks.record(RECORD)
    assert "MetricsFile cannot write" in capsys.readouterr().out


def test_no_error_of_a_callback_ends_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Callback):
        def record(self, record: Record) -> None:
            raise KeyError("loss")

        def message(self, text: str) -> None:
            raise ValueError("closed")

    callbacks = Callbacks(Broken(), ProgressLine(Config()))
    callbacks.record(RECORD)
    callbacks.record(RECORD)
    callbacks.ended("done")
    said = capsys.readouterr()
    assert said.out.count("warning: Broken failed, training goes on: KeyError: 'loss'") == 1 and "done" in said.out
    assert "warning: Broken failed, training goes on: ValueError: closed" in said.err


def test_a_terminal_that_knows_few_letters_is_told_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii"))
    ProgressLine(Config()).message("29,500 (27,800–33,100): ε")
    assert written.getvalue() == b"29,500 (27,800\\u201333,100): \\u03b5\n"


def test_going_back_outlives_a_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    class Full(MetricsFile):
        def rewind(self, step: int) -> None:
            raise OSError(28, "No space left on device")

    Callbacks(Full(Path("nowhere")), ProgressLine(Config())).rewind(2)
    assert "training goes on" in capsys.readouterr().out
