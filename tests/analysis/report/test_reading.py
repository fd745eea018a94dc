"""What holds of metrics.jsonl: later lines win, what is cut off waits, and memory does not grow."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_stable.analysis.report import reading
from megatron_stable.analysis.report.reading import Curves, backwards
from tests.analysis.report.made import probes, record


def write(path: Path, *lines: object, end: str = "\n") -> Path:
    with path.open("a") as file:
        file.write("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + end)
    return path


def read(path: Path) -> Curves:
    curves = Curves(path)
    curves.refresh()
    return curves


@pytest.mark.parametrize("block", [1, 3, 7, 64, 10_000])
def test_lines_come_backwards_whatever_the_blocks(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK", block)
    text = b"first\n\nthird is longer than others\nx\nlast"
    (tmp_path / "file").write_bytes(text)
    with (tmp_path / "file").open("rb") as file:
        assert list(backwards(file, 0, len(text))) == text.split(b"\n")[::-1]
        assert list(backwards(file, 6, 13)) == [b"third ", b""]


def test_a_later_line_supersedes_its_step_and_all_above_it(tmp_path: Path) -> None:
    path = write(
        tmp_path / "metrics.jsonl",
        *(record(step, loss=1.0) for step in range(1, 11)),
        *(record(step, loss=2.0) for step in range(5, 8)),
    )
    curves = read(path)
    assert curves.step == 7 and curves.records == 7
    np.testing.assert_array_equal(curves.series.line("loss").mean, [1, 1, 1, 1, 2, 2, 2])
    np.testing.assert_array_equal(curves.superseded.line("loss").steps, [5, 6, 7, 8, 9, 10])
    assert curves.newest["loss"] == 2.0 and curves.newest["data_step"] == 7


def test_what_is_written_later_is_added_and_a_rollback_takes_back(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", *(record(step, loss=1.0) for step in range(1, 6)))
    curves = read(path)
    assert not curves.refresh()
    write(path, '{"step": 6, "lo', end="")  # a line on its way
    assert not curves.refresh() and curves.step == 5
    write(path, 'ss": 3.0}', record(7, loss=3.0))
    assert curves.refresh()
    np.testing.assert_array_equal(curves.series.line("loss").mean, [1, 1, 1, 1, 1, 3, 3])
    write(path, record(4, loss=9.0))
    assert curves.refresh()
    for key in ("loss", "grad_norm"):
        fresh = read(path)
        for mine, theirs in zip(curves.series.line(key), fresh.series.line(key), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(curves.series.line("loss").mean, [1, 1, 1, 9])
    path.write_text("")
    write(path, record(1, loss=5.0))
    assert curves.refresh() and curves.step == 1  # another file, shorter than before


def test_probes_and_nulls_and_broken_lines(tmp_path: Path) -> None:
    measured = probes(10) | {"attention/max_logit/layer_01": None, "attention/max_logit/layer_01/head_00": 3.0}
    path = write(
        tmp_path / "metrics.jsonl",
        *(record(step) for step in range(1, 10)),
        record(10) | measured,
        "no record",
        '["neither"]',
        record(11, loss=None, grad_norm="what"),
        record(12, validation_loss=1.5),
        end="",
    )
    curves = read(path)
    assert (curves.step, curves.broken) == (12, 2)
    assert curves.series.line("attention/max_logit/layer_01").lost.tolist() == [True]
    assert "attention/max_logit/layer_01/head_00" not in curves.series, "heads are many, and left out"
    for tag, value in measured.items():
        if value is not None and "head" not in tag:
            assert curves.series.line(tag).mean.tolist() == [value]
    assert curves.series.line("loss").lost.tolist() == [False] * 10 + [True, False]
    assert "samples" not in curves.series and "grad_norm" in curves.series
    assert curves.newest["validation_loss"] == 1.5 and "logits/mean" not in curves.newest


def test_a_text_where_others_have_numbers_is_left_out(tmp_path: Path) -> None:
    curves = read(write(tmp_path / "metrics.jsonl", record(1), record(2, loss="high"), record(3)))
    assert curves.series.line("loss").steps.tolist() == [1, 3]
    assert curves.series.line("grad_norm").steps.tolist() == [1, 2, 3]


def test_however_json_is_written_the_numbers_are_the_same(tmp_path: Path) -> None:
    """Lines as Python writes them are read without a parser of JSON; all others with one."""
    odd = {"c": None, "d": True, "e": -1e-7, "f": [[1, 2], [3, 4]], "g": False}
    records = [record(step) | odd | probes(step, 1) for step in range(1, 6)] + [record(step) for step in (6, 7)]
    ours, others = read(write(tmp_path / "ours", *records)), Curves(tmp_path / "others")
    others.path.write_text("\n".join(json.dumps(each, separators=(",", ":")) for each in records))
    others.refresh()
    quoted = read(write(tmp_path / "quoted", *({'a"b': step} | each for step, each in enumerate(records))))
    for curves in (others, quoted):
        assert set(curves.series.keys) - {'a"b'} == set(ours.series.keys)
        for key in ours.series.keys:
            for mine, theirs in zip(ours.series.line(key), curves.series.line(key), strict=True):
                np.testing.assert_array_equal(mine, theirs, err_msg=key)
    assert quoted.series.line('a"b').mean.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert ours.series.line("c").lost.all() and ours.series.line("d").mean.tolist() == [1.0] * 5
    assert ours.series.line("e").mean.tolist() == [-1e-7] * 5 and "f" not in ours.series


def test_no_file_is_no_step(tmp_path: Path) -> None:
    curves = Curves(tmp_path / "metrics.jsonl")
    assert not curves.refresh() and curves.step == 0


def test_memory_does_not_grow_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK", 2**16)
    monkeypatch.setattr(reading, "BATCH", 2**12)
    peaks = []
    for steps in (2_000, 16_000):
        path = tmp_path / str(steps)
        path.write_text(
            "".join(f'{{"step": {step}, "loss": {step % 7}.5, "grad_norm": 1}}\n' for step in range(1, steps))
        )
        tracemalloc.start()
        curves = read(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert curves.records == steps - 1
    assert peaks[1] < 2 * peaks[0], peaks  # of 8 times the steps
