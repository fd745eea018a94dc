"""The row of a run, from what its directory says, whatever state that is in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_stable.config.schema import Config
from megatron_stable.stability.events import Drop, EarlyWarning, Event, Spike
from megatron_stable.study.grid import Cell
from megatron_stable.study.outcome import Ended, outcome, read_ended, write_ended
from megatron_stable.study.table import Row

Records = list[dict[str, Any]]


def made(folder: Path, records: Records, events: list[Event] = [], ended: Ended | None = None) -> Row:  # noqa: B006
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "ledger.jsonl").write_text("".join(json.dumps(event.line()) + "\n" for event in events))
    if ended:
        write_ended(folder, ended)
    return outcome(cell(folder))[0]


def cell(folder: Path) -> Cell:
    model = {"layers": 2, "hidden": 64, "vocab_size": 100}
    given = {"run": {"directory": str(folder), "steps": 100}, "model": model, "logging": {"probes_every": 10}}
    return Cell("name", {"size": "small"}, Config.model_validate(given))


def records(losses: list[float | None], **others: Any) -> Records:
    return [{"step": step, "loss": loss, "tokens_per_second": 1e4, **others} for step, loss in enumerate(losses, 1)]


FALL: list[float | None] = [5 - 0.03 * step for step in range(100)]


def test_a_run_that_finished(tmp_path: Path) -> None:
    row = made(tmp_path / "run", records(FALL), ended=Ended(status="finished"))
    assert row["status"] == "finished" and row["steps"] == 100 and row["size"] == "small"
    assert row["initial_loss"] == 5 and row["loss"] == row["train_loss"] == row["score"] == pytest.approx(2.165)
    assert row["rise"] == 0 and row["diverged_at"] is None and row["validation_loss"] is None
    assert row["parameters_total"] - row["parameters"] == 2 * 100 * 64
    tokens = 16 * 256
    assert row["seconds"] == pytest.approx(100 * tokens / 1e4) and row["tokens_per_second"] == 1e4
    assert "run.directory" not in row and row["model.hidden"] == 64


def test_what_was_superseded_does_not_count(tmp_path: Path) -> None:
    again = [*records(FALL)[:50], *records([9.0] * 20)[10:], *records(FALL)[10:]]
    row = made(tmp_path / "run", again, ended=Ended(status="finished"))
    assert row["rise"] == 0 and row["lowest_loss"] == pytest.approx(FALL[-5])


@pytest.mark.parametrize(
    ("losses", "status", "rise", "score"),
    [
        ([*FALL[:60], *[4.6] * 40], "finished", (4.6 - 3.35) / (5 - 3.35), 4.6),
        ([*FALL[:60], *[7.0] * 40], "finished", (7.0 - 3.35) / (5 - 3.35), 5.0),
        ([*FALL[:60], *[4.6] * 20], "diverged", (4.6 - 3.35) / (5 - 3.35), 5.0),
        ([*FALL[:60], *[None] * 40], "finished", 10.0, 5.0),
        ([*FALL[:60], *[4.6] * 20], "failed", (4.6 - 3.35) / (5 - 3.35), None),
        (FALL[:60], None, 0.0, None),
    ],
)
def test_scores_are_no_worse_than_at_initialisation(
    tmp_path: Path, losses: list[float | None], status: Any, rise: float, score: float | None
) -> None:
    row = made(tmp_path / "run", records(losses), ended=Ended(status=status, reason="why") if status else None)
    assert row["status"] == (status or "unfinished") and row["reason"] == (status and "why")
    assert row["rise"] == pytest.approx(rise) and row["score"] == (score and pytest.approx(score))


def test_a_run_that_never_began(tmp_path: Path) -> None:
    row = outcome(cell(tmp_path / "run"))[0]
    assert row["status"] == "unfinished" and row["steps"] == 0
    assert row["score"] is row["rise"] is row["seconds"] is row["initial_loss"] is None


def test_probes_are_means_over_the_end_of_the_most_telling_layer(tmp_path: Path) -> None:
    given = records(FALL)
    for record in given:
        step = record["step"]
        if step % 10 == 0 or step == 97:  # the guard looked closely at 97, which it may not have done after a resume
            far = 1000 if step == 97 else 0
            record["attention/max_logit/layer_00"] = step / 10 + far
            record["attention/max_logit/layer_01"] = 2.0
            record["grad_rms/fc1/layer_00"], record["grad_rms/fc1/layer_01"] = 1e-3, 1e-5
            record["output_norm/qkv/layer_00"] = None if step == 100 else 1.0
            record["noise_scale"] = 7.0
    row, measured = (
        made(tmp_path / "run", given, ended=Ended(status="finished")), outcome(cell(tmp_path / "run"))[1]
    )  # fmt: skip
    assert row["attention/max_logit"] == 10 and row["grad_rms/fc1"] == 1e-5 and row["noise_scale"] == 7
    assert row["output_norm/qkv"] is None
    assert {step for step, *_ in measured} == set(range(10, 101, 10))
    assert (20, "attention/max_logit/layer_00", 2.0) in measured


def test_events_that_a_resume_told_again_count_once(tmp_path: Path) -> None:
    spike = Spike(step=20, series="loss", value=9.0, level=4.0, scale=0.1, score=50.0, onset=20)
    drop = Drop(step=21, rule="non-finite loss", loss=None, grad_norm=None, by="guard", consecutive=1, total=1)
    warning = EarlyWarning(
        step=15, rule="attention logits", kind="past", tag="attention/max_logit/layer_00", layers=(0,), what="it",
        value=2e3, threshold=1e3, meaning="trouble", remedy="qk_norm", page="docs",
    )  # fmt: skip
    other = spike.model_copy(update={"series": "grad_norm"})
    row = made(tmp_path / "run", records(FALL), [warning, spike, other, drop, spike, drop, warning])
    assert (row["spikes"], row["dropped_updates"], row["warnings"], row["first_warning"]) == (1, 1, 1, 15)


def test_how_it_ended_comes_back(tmp_path: Path) -> None:
    assert read_ended(tmp_path) is None
    write_ended(tmp_path, Ended(status="failed", reason="no room"))
    assert read_ended(tmp_path) == Ended(status="failed", reason="no room")
