"""Metrics: appended whole, read one after another, the last record of a step counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_stable.errors import DataError
from megatron_stable.numbers import finite
from megatron_stable.records.metrics import latest, read_metrics
from megatron_stable.records.metrics_file import MetricsFile


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), None])
def test_numbers_that_json_does_not_have_are_null(value: float | None) -> None:
    assert finite(value) is None
    assert finite(2.5) == 2.5
    assert finite(0) == 0


def test_a_line_that_a_crash_cut_off_stays_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.record({"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    metrics.record({"step": 2})
    assert list(read_metrics(path)) == [{"step": 1}, {"step": 2}]
    assert path.read_text().splitlines()[1] == '{"step": 2, "lo'


def test_what_is_no_record_is_left_out_and_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"loss": 2}\n[3]\n\n{"step": true}\n{"step": 2, "loss": 4}\n{"step": 3, "lo')
    broken: list[int] = []
    assert list(read_metrics(path, broken)) == [{"step": 1}, {"step": 2, "loss": 4}]
    assert broken == [2, 3, 4, 5, 7]


def test_of_several_records_of_a_step_the_last_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 2, "loss": 9}, {"step": 1, "loss": 3}, {"step": 2, "loss": 2}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(read_metrics(path)) == lines
    assert latest(read_metrics(path)) == [lines[1], lines[2]]
    assert latest(read_metrics(tmp_path / "nothing")) == []


def test_a_file_that_cannot_be_read_is_an_error_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "metrics.jsonl").write_text("{}")
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(DataError, match=r"cannot read .*metrics.jsonl: Permission denied"):
        list(read_metrics(tmp_path / "metrics.jsonl"))
