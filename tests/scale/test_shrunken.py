"""Each example, narrow: memory by kind in its own layout, and training on real ranks beside the same on one rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_stable.analysis.footprint import footprints
from megatron_stable.config.load import load_config
from megatron_stable.config.schema import Config
from megatron_stable.records.directory import RunDirectory
from tests.harness.ranks import Ranks
from tests.scale.counting import count_on_rank
from tests.scale.shrunken import few_ranks, narrow, toy_run
from tests.test_examples import CONFIGS, EXAMPLES
from tests.test_examples import ranks as world_of
from tests.training.runs import metrics, train

QUICK = {"laptop", "10b"}  # in `make test`; all of them in `make test-all`
EACH = [pytest.param(path, id=path.stem, marks=[pytest.mark.full] * (path.stem not in QUICK)) for path in CONFIGS]
STEPS = 6


@pytest.mark.parametrize("path", EACH)
def test_memory_by_kind_is_that_of_the_footprint(path: Path, ranks: Ranks) -> None:
    """On the first, a middle and the last rank of the example's own layout, which imagine all others."""
    world = world_of(path)
    some = sorted({0, world // 2, world - 1})
    example = Config.model_validate(narrow(path, 256, 64, 1)).parallel
    replicas = world // (example.tensor * example.pipeline)
    config = Config.model_validate({**narrow(path, 256, 64, replicas), "logging": {"probes_every": 0}})
    expected = footprints(config, world)
    found = ranks.run(world, count_on_rank, config.model_dump(mode="json"), only=some)
    for rank, result in zip(some, found, strict=True):
        mine, held = expected[rank * config.parallel.pipeline // world], result["held"]
        assert result["parameters"] == mine.parameters
        assert held["weights"] == pytest.approx(mine.weights, rel=0.02)
        optimizer = held.get("masters", 0) + held.get("moments", 0)
        assert optimizer == pytest.approx(mine.optimizer, rel=0.05)
        # beside the gradients there are the activations of short sequences
        assert held["gradients"] == pytest.approx(mine.gradients, rel=0.02, abs=131072)


@pytest.mark.parametrize("path", EACH)
def test_it_trains_and_its_curve_is_that_of_one_rank(path: Path, tmp_path: Path, ranks: Ranks) -> None:
    world, layout = few_ranks(path)
    values = toy_run(path, tmp_path, STEPS, world, **layout)
    alone = toy_run(path, tmp_path, STEPS, 1, tensor=1, pipeline=1)
    alone["parallel"]["sequence"] = False
    assert ranks.run(world, train, values) == [0] * world
    assert ranks.run(1, train, alone) == [0]
    split, whole = metrics(values["run"]["directory"]), metrics(alone["run"]["directory"])
    assert list(split) == list(range(1, STEPS + 1))
    rough = {"fp32": 1e-4, "bf16": 1e-2}[values["precision"]["dtype"]]
    for step, record in split.items():
        assert record["loss"] == pytest.approx(whole[step]["loss"], rel=rough)
        assert record["grad_norm"] == pytest.approx(whole[step]["grad_norm"], rel=10 * rough)
        assert not record["skipped"]
    assert split[STEPS]["loss"] < split[1]["loss"] - 0.1
    assert split[STEPS]["validation_loss"] == pytest.approx(whole[STEPS]["validation_loss"], rel=rough)
    assert RunDirectory(values["run"]["directory"]).checkpoints.joinpath("latest").exists()


def test_each_is_trained_in_its_own_layout_but_for_fewer_replicas() -> None:
    for path in CONFIGS:
        own = load_config(path).parallel
        assert few_ranks(path)[1] == {"tensor": own.tensor, "pipeline": own.pipeline}
    assert few_ranks(EXAMPLES / "30b.yaml")[0] == 8
