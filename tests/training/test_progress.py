"""The progress line, whatever becomes of the numbers and the terminal."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from megatron_stable.config.schema import Config
from megatron_stable.training.progress import ProgressLine, duration

RECORD: dict[str, Any] = {"step": 1, "loss": 2.5, "grad_norm": 0.5, "tokens_per_second": None, "skipped": False}


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


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3599.9, "1:00:00"), (90061, "25:01:01")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_stall_does_not_count_for_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line, now = ProgressLine(Config.model_validate({"run": {"steps": 200}})), 0.0
    for step in range(1, 101):
        now += 75.0 if step == 60 else 2.0
        monkeypatch.setattr("time.monotonic", lambda now=now: now)
        line.record({**RECORD, "step": step})
    assert capsys.readouterr().out.splitlines()[-1].endswith("step 100/200 · loss 2.5000 · grad norm 0.5 · 3:20 left")
