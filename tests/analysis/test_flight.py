"""What the flight recorder kept, and what stood out in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_stable.analysis.flight import covering, flights, rows, standouts
from megatron_stable.records.directory import RunDirectory
from megatron_stable.stability.events import FlightRecorded


def measured(steps: int = 40, layers: int = 4) -> list[dict[str, Any]]:
    """Noise of 2% everywhere, but logits that double from step 21 on at layer 2, and from 31 on at layer 3."""
    random = np.random.default_rng(0)
    found = []
    for step in range(1, steps + 1):
        row: dict[str, Any] = {"step": step}
        for layer in range(layers):
            begin = {2: 20, 3: 30}.get(layer, steps)
            row[f"attention/max_logit/layer_{layer:02}"] = 5 * random.normal(1, 0.02) * 2.0 ** max(0, step - begin)
            row[f"output_norm/qkv/layer_{layer:02}"] = 8 * random.normal(1, 0.02)
        row["logits/mean"] = -1 + 0.02 * random.normal()
        found.append(row)
    return found


def test_the_layer_that_left_its_level_first_is_named() -> None:
    (found,) = standouts(measured())
    assert (found.name, found.layer, found.onset) == ("attention/max_logit", 2, 21)
    assert (found.layers, found.of, found.farthest) == (2, 4, 2)
    assert found.level == pytest.approx(5, rel=0.02) and found.last == pytest.approx(5 * 2**20, rel=0.1)
    words = "attention/max_logit at layer 2: from 4.98 to 5.24e+06, × 1.05e+06, since step 21; 2 of 4 layers"
    assert found.words() == words
    assert standouts(measured(20)) == [] and standouts(measured(5)) == [] and standouts([]) == []


def test_the_farthest_comes_first_and_what_is_not_finite_before_it() -> None:
    steps = measured()
    for row in steps:
        row["logits/mean"] = None if row["step"] >= 38 else row["logits/mean"]
        row["output_norm/qkv/layer_00"] *= 0.1 if row["step"] >= 36 else 1  # what falls stands out, too
    found = standouts(steps)
    assert [(one.name, one.onset) for one in found] == [
        ("logits/mean", 38), ("attention/max_logit", 21), ("output_norm/qkv", 36),
    ]  # fmt: skip
    assert found[0].last is None and found[0].score is None and "to not finite" in found[0].words()


def test_a_peak_that_is_over_does_not_stand_out() -> None:
    steps = measured(20)
    steps[12]["logits/mean"] = 40.0
    assert standouts(steps) == []


def test_the_file_that_covers_a_step(tmp_path: Path) -> None:
    (tmp_path / "flight").mkdir()
    for first, last in ((10, 20), (15, 60)):
        path = tmp_path / "flight" / f"step_{last:08}.jsonl"
        path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(first, last + 1)) + '{"step": 9')
    (tmp_path / "flight" / "step_x.jsonl").write_text("{}")
    assert [(flight.first, flight.last) for flight in flights(tmp_path)] == [(10, 20), (15, 60)]
    last = {n: found and found.last for n in (9, 10, 20, 21, 60, 61) for found in [covering(tmp_path, n, n)]}
    assert last == {9: None, 10: 20, 20: 20, 21: 60, 60: 60, 61: None}
    assert [row["step"] for row in rows(flights(tmp_path)[0].path)] == list(range(10, 21))
    assert flights(tmp_path / "elsewhere") == []


def test_a_step_that_was_trained_again_is_not_found_in_the_file_from_before_the_rollback(tmp_path: Path) -> None:
    (tmp_path / "flight").mkdir()
    ledger = RunDirectory(tmp_path).ledger
    for first, last, data_step in ((30, 69, 103), (41, 68, 162)):  # in between the run went back to step 40
        name = f"flight/step_{last:08}.jsonl"
        (tmp_path / name).write_text("".join(json.dumps({"step": step}) + "\n" for step in range(first, last + 1)))
        ledger.write(FlightRecorded(step=last, data_step=data_step, file=name, first=first, last=last))
    places = {(45, 45): None, (45, 79): 69, (45, 139): 68, (69, 103): 69, (69, 163): None}
    assert {at: found and found.last for at in places for found in [covering(tmp_path, *at)]} == places
