"""Faults on purpose, on every layout: all ranks decide alike, and the run ends as if the data had never been there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_stable.checkpoint import store
from tests.checkpoint.stored import contents, equal
from tests.harness.ranks import Ranks
from tests.training.faults import RARE, poison, run_of, train_with_faults
from tests.training.runs import VOCAB, Values, curve, layout, metrics, write_data

STEPS = 60
TROUBLE = (40, 52)  # data steps
LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "tp2": (2, layout(tensor=2), "fp32"),
    "pp2": (2, layout(pipeline=2), "bf16"),
    "zero2": (2, layout(zero_stage=2), "fp16"),
    "zero3": (2, layout(zero_stage=3), "fp32"),
    "tp2-pp2-sp": (4, layout(tensor=2, pipeline=2, sequence=True), "fp32"),
    "tp2-pp2-dp2": (8, layout(tensor=2, pipeline=2), "bf16"),
}
MORE: dict[str, tuple[int, dict[str, Any], str]] = {
    "tp2-sp": (2, layout(tensor=2, sequence=True), "bf16"),
    "pp2-fp16": (2, layout(pipeline=2), "fp16"),
    "zero1": (2, layout(), "fp32"),
    "zero3-fp16": (2, layout(zero_stage=3), "fp16"),
    "tp4": (4, layout(tensor=4), "bf16"),
    "pp4": (4, layout(pipeline=4), "fp32"),
    "dp4-zero2": (4, layout(zero_stage=2), "bf16"),
    "tp2-dp2-zero3": (4, layout(tensor=2, zero_stage=3), "bf16"),
    "pp2-dp2": (4, layout(pipeline=2), "fp16"),
    "tp4-dp2": (8, layout(tensor=4), "fp16"),
    "tp2-pp4": (8, layout(tensor=2, pipeline=4), "fp32"),
    "dp8-zero3": (8, layout(zero_stage=3), "fp32"),
    "tp2-dp4-zero2": (8, layout(tensor=2, zero_stage=2), "bf16"),
}
EVERY = [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.full) for name in MORE)]


def scene(name: str, kind: str, world: int) -> list[dict[str, Any]]:
    """Passing faults, and one that will not pass."""
    passing = [
        {"kind": "nan_gradient", "data_steps": [12, 12], "rank": world - 1},
        {"kind": "inf_loss", "data_steps": [15, 15]},
        {"kind": "scale_gradient", "data_steps": [18, 18], "factor": 100},
        {"kind": "scale_gradient", "data_steps": [22, 24], "factor": 100},
    ]
    lasting: dict[str, dict[str, Any]] = {
        "nan": {"kind": "nan_gradient", "data_steps": TROUBLE, "rank": world - 1},
        "inf": {"kind": "inf_loss", "data_steps": TROUBLE},
        "ascent": {"kind": "scale_gradient", "data_steps": (TROUBLE[0], TROUBLE[1] + 17), "factor": -100},
        "overflow": {"kind": "scale_gradient", "data_steps": TROUBLE, "factor": 1e30},
    }
    return [*passing, lasting[kind]] if kind in lasting else passing


def struck(ranks: Ranks, folder: Path, name: str, kind: str, **sections: Any) -> tuple[Values, list[Any], int]:
    """Train into a lasting fault on a layout, and then once more with the same windows skipped from the start."""
    world, parallel, dtype = {**LAYOUTS, **MORE}[name]
    precision = {"dtype": dtype, "initial_scale_power": 4}
    write_data(folder / "data", tokens=20000, vocab=VOCAB - RARE)
    replicas = world // (parallel["tensor"] * parallel["pipeline"])
    if kind == "ascent":
        sections = {**sections, "optimizer": {"learning_rate": 2e-2}}
    sections = {**sections, "batch": {"micro_size": max(1, 4 // replicas)}}
    values = run_of(folder, "struck", STEPS, parallel=parallel, precision=precision, **sections)
    if kind == "poison":
        poison(values, range(TROUBLE[0], TROUBLE[1] + 1))
    faults = scene(name, kind, world)
    outcome = ranks.run(world, train_with_faults, values, faults)
    assert [code for code, _ in outcome] == [0] * world
    said = [words for _, words in outcome]
    assert all(words == said[0] for words in said), "the ranks disagreed"
    windows = [w for item in interventions(values) for w in item["windows"]]
    told = run_of(folder, "told", STEPS, parallel=parallel, precision=precision, **sections)
    told["data"]["skip"] = windows
    assert [code for code, _ in ranks.run(world, train_with_faults, told, faults)] == [0] * world
    assert interventions(told) == [], "there was nothing left to do"
    assert equal(last(values), last(told)), "not what a run is that never saw the data"
    assert curve(values["run"]["directory"]) == curve(told["run"]["directory"])
    return values, said[0], world


def interventions(values: Values) -> list[dict[str, Any]]:
    path = Path(values["run"]["directory"]) / "interventions.json"
    return json.loads(path.read_text()) if path.is_file() else []


def last(values: Values) -> dict[str, Any]:
    root = Path(values["run"]["directory"]) / "checkpoints"
    entry = store.entries(root)[-1]
    assert entry.step == STEPS
    return contents(entry.directory)


def events(values: Values, kind: str) -> list[dict[str, Any]]:
    lines = (Path(values["run"]["directory"]) / "ledger.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


KINDS = {"tp2": "inf", "pp2": "nan", "zero2": "overflow", "zero3": "nan", "tp2-pp2-sp": "ascent", "tp2-pp2-dp2": "inf"}


OFTEN = ("zero2",)


@pytest.mark.parametrize("name", [it if it in OFTEN else pytest.param(it, marks=pytest.mark.full) for it in LAYOUTS])
def test_faults_that_pass_and_one_that_does_not(ranks: Ranks, tmp_path: Path, name: str) -> None:
    check(ranks, tmp_path, name, KINDS[name])


@pytest.mark.full
@pytest.mark.parametrize("kind", ["nan", "inf", "ascent", "overflow"])
@pytest.mark.parametrize("name", [*LAYOUTS, *MORE])
def test_every_fault_on_every_layout(ranks: Ranks, tmp_path: Path, name: str, kind: str) -> None:
    if kind == "overflow" and {**LAYOUTS, **MORE}[name][2] != "fp16":
        pytest.skip("only fp16 has a loss scale")
    check(ranks, tmp_path, name, kind)


def check(ranks: Ranks, folder: Path, name: str, kind: str) -> None:
    values, said, _ = struck(ranks, folder, name, kind)
    made = interventions(values)
    assert made, "nothing was done"
    fp16 = values["precision"]["dtype"] == "fp16"
    rule = {"nan": FLOOR if fp16 else "consecutive drops", "inf": "consecutive drops", "ascent": "divergence"}
    assert made[0]["rule"] == rule.get(kind, FLOOR)
    assert all(item["by"] == "guard" and item["reset_loss_scale"] == fp16 for item in made)
    assert TROUBLE[0] <= made[0]["onset"] <= TROUBLE[0] + (8 if kind == "ascent" else 3)
    first, dropped = {}, [step for step, taken, _, _ in said if taken is False]
    for step, taken, _, _ in said:
        first.setdefault(step, taken)
    assert {12, 15} <= set(dropped) or fp16, "a NaN on one rank, an infinite loss on the last stage"
    assert all(first[step] for step in (18, 22, 23, 24)), "a large gradient is clipped, not dropped"
    records = metrics(values["run"]["directory"])
    assert list(records) == sorted(records) and len(records) == STEPS
    skipped = sum(last - first + 1 for first, last in skipped_in(made))
    assert records[STEPS]["data_step"] == STEPS + skipped


def skipped_in(made: list[dict[str, Any]]) -> tuple[tuple[int, int], ...]:
    from megatron_stable.data.skip import merged

    return merged(window for item in made for window in item["windows"])


FLOOR = "loss scale at its floor"


@pytest.mark.full
def test_a_poisoned_stretch_of_data(ranks: Ranks, tmp_path: Path) -> None:
    """Updates at spikes are dropped; what stays up is asked about, and is the data's: the run goes on through it."""
    values, said, _ = struck(ranks, tmp_path, "pp2", "poison", guard={"drop_spikes": True})
    assert interventions(values) == []
    assert any(taken is False and step >= TROUBLE[0] for step, taken, _, _ in said)
    found = events(values, "drop")
    assert {event["rule"] for event in found if event["data_step"] >= TROUBLE[0]} == {"spike"}
    assert {event["data_step"] for event in found if event["rule"] == "spike"} <= set(range(*TROUBLE)) | {TROUBLE[1]}
    verdicts = {event["verdict"] for event in events(values, "second_opinion")}
    assert "data" in verdicts and "state" not in verdicts
    (shift,) = events(values, "shift")
    assert TROUBLE[0] <= shift["onset"] <= TROUBLE[0] + 2
