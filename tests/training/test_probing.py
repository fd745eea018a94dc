"""What is measured inside the model is on record at its steps, and when trouble begins, so are the steps before it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_stable.analysis.flight import flights, rows
from megatron_stable.config.schema import Config
from megatron_stable.stability.probes import PROBES, places
from tests.harness.ranks import Ranks
from tests.training.runs import Values, metrics, settings, train, write_data

FAULT = 31
GUARD = {"mode": "watch", "warmup": 16}


@pytest.fixture
def values(tmp_path: Path) -> Values:
    write_data(tmp_path / "data", tokens=12000)
    return settings(
        tmp_path, steps=44, guard=GUARD,
        logging={"tensorboard": False, "probes_every": 4, "flight_recorder": 8, "every": 3},
    )  # fmt: skip


def tags(config: Config) -> set[str]:
    return {where.tag for probe in PROBES.values() for where in places(probe, config.model.layers)}


def measured(run: str) -> set[int]:
    return {step for step, record in metrics(run).items() if "logits/mean" in record}


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2, "pipeline": 2}], ids=["alone", "tp2-pp2"])
def test_records_have_all_tags_at_their_steps_and_a_flight_the_steps_before_a_spike(
    ranks: Ranks, values: Values, parallel: dict[str, int]
) -> None:
    fault = [{"kind": "inf_loss", "data_steps": [FAULT, FAULT]}]
    values["parallel"] = parallel
    values["logging"] |= {"flight_every": 0 if parallel else 2}
    codes = ranks.run(4 if parallel else 1, train_with, values, json.dumps(fault))
    assert set(codes) == {0}
    run = values["run"]["directory"]
    records, expected = metrics(run), tags(Config.model_validate(values))
    normal = {step for step in range(1, 45) if step % 4 == 0}
    close = set(range(FAULT + 1, 45))
    assert measured(run) == normal | close, "each 4th step, and after the spike each one"
    assert {step for step in records if step % 3 == 0} >= {step for step in range(1, 45) if step % 3 == 0}
    for step in measured(run):
        assert expected - set(records[step]) <= {"noise_scale"}, step
    (flight,) = flights(Path(run))
    step, file, kept_rows = flight.last, flight.path, rows(flight.path)
    kept = [4, 8, 12, 16, 20, 24, 28] if parallel else [16, 18, 20, 22, 24, 26, 28, 30]
    assert step == FAULT and [row["step"] for row in kept_rows] == kept
    for row in kept_rows:
        if row["step"] % 4:
            continue
        assert {key: row[key] for key in expected & set(row)} == {
            key: records[row["step"]][key] for key in expected & set(row)
        }
    (event,) = [json.loads(line) for line in (Path(run) / "ledger.jsonl").open() if "flight_recorded" in line]
    assert (event["step"], event["first"], event["last"]) == (FAULT, kept[0], kept[-1])
    assert event["file"] == str(file.relative_to(run)) and event["data_step"] == FAULT


def train_with(values: Values, faults: str) -> int:
    """On a rank: train with faults."""
    import os

    os.environ["MEGATRON_STABLE_FAULTS"] = faults
    try:
        return train(values)
    finally:
        del os.environ["MEGATRON_STABLE_FAULTS"]


def test_without_probes_nothing_is_measured(ranks: Ranks, values: Values) -> None:
    values["logging"] |= {"probes_every": 0}
    values["run"] |= {"steps": 6}
    assert ranks.run(1, train, values) == [0]
    assert not measured(values["run"]["directory"])
