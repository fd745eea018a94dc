"""What a run leaves in its directory: metrics, TensorBoard, ledger, configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_stable.config.load import load_config
from megatron_stable.config.schema import Config
from megatron_stable.stability.probes import parse
from tests.harness.ranks import Ranks
from tests.training.runs import layout, metrics, settings, train, write_data

KEYS = {
    "step", "loss", "z_loss", "grad_norm", "learning_rate", "loss_scale", "tokens", "tokens_per_second", "skipped",
    "data_step", "samples", "loss_score", "grad_norm_score",
}  # fmt: skip
TAGS = {
    "train/loss": "loss",
    "train/z_loss": "z_loss",
    "train/grad_norm": "grad_norm",
    "train/learning_rate": "learning_rate",
    "train/loss_scale": "loss_scale",
    "train/tokens_per_second": "tokens_per_second",
    "validation/loss": "validation_loss",
    "validation/perplexity": "validation_perplexity",
    "train/data_step": "data_step",
    "guard/loss_score": "loss_score",
    "guard/grad_norm_score": "grad_norm_score",
    "guard/dropped": "skipped",
}


@pytest.fixture(scope="module")
def resumed(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 7 steps, resumed for 3 more with another learning rate."""
    folder = tmp_path_factory.mktemp("records")
    write_data(folder / "data")
    write_data(folder / "validation", tokens=2000, seed=1)
    sections: dict[str, dict[str, Any]] = {
        "parallel": layout(pipeline=2),
        "data": {"train": str(folder / "data"), "validation": str(folder / "validation")},
        "evaluation": {"every": 4, "batches": 2},
        "logging": {"tensorboard": True},
        "checkpoint": {"every": 5, "keep": 1},
    }
    first = settings(folder, steps=7, **sections)
    assert ranks.run(2, train, first) == [0, 0]
    second = settings(folder, steps=10, **sections, optimizer={"eps": 1e-3, "learning_rate": 1e-3})
    assert ranks.run(2, train, second) == [0, 0]
    return folder / "run"


def epochs(run: Path) -> str:
    """What tells how often the run's dataset has been read."""
    return f"epochs/{run.parent / 'data'}"


def test_metrics_hold_a_line_per_step(resumed: Path) -> None:
    records = metrics(resumed)
    assert list(records) == list(range(1, 11))
    for step, record in records.items():
        evaluated = step in (4, 7, 8, 10)
        own = {key for key in record if parse(key) is None}
        assert record[epochs(resumed)] == step * 8 / ((4000 - 1) // 16), "of the windows of the dataset"
        own -= {epochs(resumed)}
        assert own == KEYS | ({"validation_loss", "validation_perplexity"} if evaluated else set())
        assert (own | {epochs(resumed)} != set(record)) == (step == 10), "probes at each tenth step"
        assert (record["tokens"], record["data_step"], record["skipped"]) == (step * 8 * 16, step, False)
        assert record["loss_scale"] == 1 and 0 < record["z_loss"] < 0.1 and record["grad_norm"] > 0
        assert (record["tokens_per_second"] is None) == (step in (1, 8))  # which warm up
    assert records[10]["validation_loss"] < records[4]["validation_loss"]
    assert records[4]["validation_perplexity"] == pytest.approx(2.718281828459045 ** records[4]["validation_loss"])


def test_tensorboard_shows_the_same_numbers(resumed: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(resumed / "tensorboard"))
    events.Reload()
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    records = metrics(resumed)
    keys = TAGS | {key: key for key in records[10] if parse(key)} | {epochs(resumed): epochs(resumed)}
    assert set(events.Tags()["scalars"]) == set(keys)
    for tag, key in keys.items():
        expected = {step: float(record[key]) for step, record in records.items() if record.get(key) is not None}
        assert {event.step: event.value for event in events.Scalars(tag)} == pytest.approx(expected, rel=1e-6), tag


def test_the_ledger_tells_of_starts_and_changes(resumed: Path) -> None:
    start, resume = [json.loads(line) for line in (resumed / "ledger.jsonl").read_text().splitlines()]
    assert (start["event"], start["step"], start["ranks"]) == ("start", 0, 2)
    assert start["layout"]["pipeline"] == 2 and "changed" not in start
    assert (resume["event"], resume["step"]) == ("resume", 7)
    assert resume["changed"] == {"run.steps": [7, 10], "optimizer.learning_rate": [3e-3, 1e-3]}


def test_what_the_user_changed_takes_effect(resumed: Path) -> None:
    rates = {step: record["learning_rate"] for step, record in metrics(resumed).items()}
    assert max(rate for step, rate in rates.items() if step > 7) < 1e-3 < max(rates.values())


def test_the_configuration_is_there_resolved(resumed: Path) -> None:
    config = load_config(resumed / "config.yaml")
    assert config == Config.model_validate(config.model_dump())
    assert (config.run.steps, config.optimizer.learning_rate, config.model.qk_norm) == (10, 1e-3, True)
    manifest = json.loads((resumed / "checkpoints/step_00000010/manifest.json").read_text())
    assert Config.model_validate(manifest["config"]) == config


def test_only_what_the_design_names_is_in_the_directory(resumed: Path) -> None:
    assert {path.name for path in resumed.iterdir()} == {
        "config.yaml", "metrics.jsonl", "ledger.jsonl", "logbook.md", "tensorboard", "checkpoints", "format.json",
        "ranks.json", "stages.json", ".lock",
    }  # fmt: skip
    assert (resumed / "checkpoints/latest").read_text() == "step_00000010\n"
    names = {path.name for path in (resumed / "checkpoints").iterdir()}
    assert names == {"latest", "step_00000005", "step_00000007", "step_00000010"}
