"""The picture of a run: events, and curves of any length."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from megatron_stable.analysis.figure import SMOOTH, Event, _smoothed, draw
from megatron_stable.errors import DataError

RECORDS = [{"step": n, "loss": 8 / n, "grad_norm": 1 / n} for n in range(1, 60)]


def test_events_are_marked_each_label_once(tmp_path: Path) -> None:
    events = [Event(10, 14, "spike"), Event(30, 30, "spike"), Event(40, 59, "divergence")]
    pictures = {}
    for name, marked in (("none", []), ("one", events[:1]), ("all", events)):
        draw({"run": RECORDS}, tmp_path / name, events=marked)
        pictures[name] = (tmp_path / name).read_bytes()
    assert len(set(pictures.values())) == 3
    draw({"run": RECORDS}, tmp_path / "again", events=events)
    assert (tmp_path / "again").read_bytes() == pictures["all"]


def test_axes_are_named(tmp_path: Path) -> None:
    draw({"run": RECORDS}, tmp_path / "usual")
    draw({"run": RECORDS}, tmp_path / "named", labels=("lm loss", "grad-norm"))
    assert (tmp_path / "usual").read_bytes() != (tmp_path / "named").read_bytes()


def test_the_smoothed_curve_is_a_mean_over_a_window() -> None:
    values = [random.Random(0).gauss(5, 1) for _ in range(7 * SMOOTH + 3)]
    smoothed, last = _smoothed(values), len(values) - 1
    for i in (0, 1, 5, 100, 200, last - 3, last):
        width = min(7, i)
        window = values[i - width : i + width + 1]
        assert math.isclose(smoothed[i], sum(window) / len(window), rel_tol=1e-12)
    assert _smoothed([]) == []


def test_values_that_are_not_finite_leave_the_rest_as_it_is(tmp_path: Path) -> None:
    holes = [record | ({"loss": None, "grad_norm": None} if record["step"] % 7 == 0 else {}) for record in RECORDS]
    nan = [
        record | ({"loss": math.nan, "grad_norm": math.inf} if record["step"] % 7 == 0 else {}) for record in RECORDS
    ]
    draw({"run": holes}, tmp_path / "none")
    draw({"run": nan}, tmp_path / "nan")
    assert (tmp_path / "none").read_bytes() == (tmp_path / "nan").read_bytes()


def test_one_run_and_several_and_none(tmp_path: Path) -> None:
    records = [record | ({"validation_loss": 1.0} if record["step"] == 10 else {}) for record in RECORDS]
    draw({"one": records}, tmp_path / "one", "title")
    draw({"one": records, "two": records[:7]}, tmp_path / "two")
    one, two = ((tmp_path / name).read_bytes() for name in ("one", "two"))
    assert one.startswith(b"\x89PNG\r\n\x1a\n") and one != two
    with pytest.raises(DataError, match="no step yet"):
        draw({"none": []}, tmp_path / "none")
    assert not (tmp_path / "none").exists()
