"""Data or state: the guard asks the model, on every layout, and all ranks hear the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_stable.config.schema import Config
from megatron_stable.data import Batches, Course, open_dataset
from megatron_stable.data.indexed import dataset_paths
from tests.checkpoint.stored import equal
from tests.harness.ranks import Ranks
from tests.training.faults import RARE, run_of, train_with_faults
from tests.training.runs import VOCAB, Values, layout, write_data
from tests.training.test_faults import STEPS, events, interventions, last

CHANGE = 38  # the step from which on something is different
DROPOUT = {"dropout": 0.2, "attention_dropout": 0.2}
ASCENT = {"kind": "scale_gradient", "data_steps": (CHANGE, CHANGE + 29), "factor": -100}
LAYOUTS: dict[str, tuple[int, dict[str, Any], str, dict[str, float]]] = {
    "alone": (1, layout(), "fp32", {}),
    "tp2-sp-dropout": (2, layout(tensor=2, sequence=True), "fp32", DROPOUT),
    "pp2-bf16": (2, layout(pipeline=2), "bf16", {}),
    "zero3": (2, layout(zero_stage=3), "fp32", {}),
    "tp2-pp2-dp2-bf16-dropout": (8, layout(tensor=2, pipeline=2), "bf16", DROPOUT),
    "tp2-pp2-dp2": (8, layout(tensor=2, pipeline=2), "fp32", {}),
    "tp2-bf16": (2, layout(tensor=2), "bf16", {}),
    "pp2-dropout": (2, layout(pipeline=2), "fp32", DROPOUT),
    "zero1-dropout": (2, layout(), "fp32", DROPOUT),
    "zero2": (2, layout(zero_stage=2), "fp32", {}),
    "zero2-bf16-dropout": (2, layout(zero_stage=2), "bf16", DROPOUT),
    "zero3-bf16-dropout": (2, layout(zero_stage=3), "bf16", DROPOUT),
    "tp2-zero3": (4, layout(tensor=2, zero_stage=3), "fp32", {}),
    "fp16": (2, layout(), "fp16", {}),
}


def every(*quick: str) -> list[Any]:
    """All layouts, of which `make test` runs some."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS]


def prepared(folder: Path, name: str, changed: bool, **sections: Any) -> tuple[Values, int]:
    """Settings of a run, and its number of ranks; ``changed``: from step CHANGE on, samples are of ``RARE`` tokens."""
    world, parallel, dtype, dropout = LAYOUTS[name]
    write_data(folder / "data", tokens=20000, vocab=VOCAB - RARE)
    replicas = world // (parallel["tensor"] * parallel["pipeline"])
    values = run_of(
        folder,
        "run",
        STEPS,
        parallel=parallel,
        precision={"dtype": dtype, "initial_scale_power": 4},
        model=dropout,
        batch={"micro_size": max(1, 4 // replicas)},
        optimizer={"learning_rate": 2e-2 if not changed else 3e-3},
        **sections,
    )
    if changed:
        spoil(values)
    return values, world


def spoil(values: Values) -> None:
    """Make the data another kind from step CHANGE on: a part of each sample is of tokens that occur nowhere else."""
    config = Config.model_validate(values)
    assert isinstance(config.data.train, str)
    dataset = open_dataset(config.data.train, config.model.sequence_length, config.run.seed)
    batches = Batches(dataset, Course.begin(config.batch.global_size), config.batch.micro_size)
    tokens, drawn = np.memmap(dataset_paths(Path(config.data.train))[0], np.uint16, "r+"), np.random.default_rng(0)
    length = config.model.sequence_length
    for step in range(CHANGE, STEPS + 30):
        for k in batches.samples(step):
            start = dataset.locate(k).start
            tokens[start : start + length // 2] = VOCAB - 1 - drawn.integers(0, RARE, length // 2)
    tokens.flush()


def trained(ranks: Ranks, values: Values, world: int, *faults: dict[str, Any]) -> list[Any]:
    """Second opinions of a run; all ranks have had the same."""
    outcome = ranks.run(world, train_with_faults, values, list(faults), timeout=240)
    assert [code for code, _ in outcome] == [0] * world
    assert all(said == outcome[0][1] for _, said in outcome), "the ranks disagreed"
    return [opinion for _, taken, _, opinion in outcome[0][1] if taken is None]


@pytest.mark.parametrize("name", every("tp2-sp-dropout"))
def test_a_state_that_fails_is_rolled_back(ranks: Ranks, tmp_path: Path, name: str) -> None:
    values, world = prepared(tmp_path, name, changed=False)
    opinions = trained(ranks, values, world, ASCENT)
    assert opinions[0].verdict == "state"
    question = opinions[0].question
    assert CHANGE <= question.onset <= CHANGE + 8
    assert question.rise > 0.1 and abs(opinions[0].now.gap) < question.rise / 2
    assert interventions(values)[0]["rule"] == "divergence"
    told = events(values, "second_opinion")[0]
    assert (told["verdict"], told["rise"]) == ("state", pytest.approx(question.rise))
    assert told["checkpoint"] is None or told["checkpoint"] < question.onset


@pytest.mark.parametrize("name", every("alone", "pp2-bf16"))
def test_data_that_change_are_a_shift(ranks: Ranks, tmp_path: Path, name: str) -> None:
    values, world = prepared(tmp_path, name, changed=True)
    opinions = trained(ranks, values, world)
    verdicts = {opinion.verdict for opinion in opinions}
    assert "data" in verdicts and "state" not in verdicts
    assert interventions(values) == []
    (shift,) = events(values, "shift")
    assert CHANGE <= shift["onset"] <= CHANGE + 2 and shift["rise"] > 0.5


@pytest.mark.parametrize("name", ["alone", pytest.param("tp2-pp2-dp2-bf16-dropout", marks=pytest.mark.full)])
def test_asking_changes_nothing(ranks: Ranks, tmp_path: Path, name: str) -> None:
    """Weights and moments are bit for bit those of a run that never asks; the checkpoint's are taken out again."""
    values, world = prepared(tmp_path, name, changed=False, guard={"mode": "watch"})
    opinions = trained(ranks, values, world, ASCENT)
    assert any(opinion.checkpoint is not None for opinion in opinions), "a checkpoint was asked, too"
    silent = {**values, "run": {**values["run"], "directory": str(tmp_path / "silent")}, "guard": {"mode": "off"}}
    assert trained(ranks, silent, world, ASCENT) == []
    assert equal(last(values), last(silent))
