"""What the user changes wins over what the checkpoint holds, and the ledger says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_stable.records.ledger import Ledger
from megatron_stable.stability.events import Resume
from tests.checkpoint.stored import keep_only
from tests.harness.ranks import Ranks
from tests.training.runs import Values, metrics, settings, train, write_data


def groups_after_resume(values: Values) -> tuple[list[dict[str, Any]], float]:
    """On a rank: resume; the optimizer's groups as they then are, and DeepSpeed's clip."""
    from megatron_stable.config.schema import Config
    from megatron_stable.parallel.topology import Topology
    from megatron_stable.records.callbacks import Callbacks
    from megatron_stable.records.directory import RunDirectory
    from megatron_stable.training.trainer import Trainer

    config = Config.model_validate(values)
    trainer = Trainer(config, Topology(), RunDirectory(config.run.directory), Callbacks())
    trainer.resume()
    assert trainer.step == 5
    groups = [{k: v for k, v in group.items() if k != "params"} for group in trainer.engine.optimizer.param_groups]
    return groups, trainer.engine.optimizer._clipping.limit


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_optimizer_settings_are_the_users(ranks: Ranks, tmp_path: Path, zero_stage: int) -> None:
    write_data(tmp_path / "data")
    parallel = {"zero_stage": zero_stage}
    assert ranks.run(1, train, settings(tmp_path, steps=5, parallel=parallel)) == [0]
    changed = settings(
        tmp_path, steps=9, parallel=parallel,
        optimizer={"learning_rate": 1e-4, "betas": [0.5, 0.75], "eps": 1e-5, "weight_decay": 0.3, "clip_grad": 0.25},
        schedule={"kind": "constant", "min_learning_rate": 0.0},
    )  # fmt: skip
    groups, clip = ranks.run(1, groups_after_resume, changed)[0]
    assert clip == 0.25
    assert all(tuple(group["betas"]) == (0.5, 0.75) and group["eps"] == 1e-5 for group in groups)
    assert sorted({group["weight_decay"] for group in groups}) == [0.0, 0.3]
    assert ranks.run(1, train, changed) == [0]
    assert metrics(changed["run"]["directory"])[6]["learning_rate"] == 1e-4
    (event,) = (e for e in Ledger(tmp_path / "run" / "ledger.jsonl").read() if isinstance(e, Resume))
    assert event.step == 5
    assert event.changed["optimizer.learning_rate"] == (3e-3, 1e-4)
    assert event.changed["optimizer.betas"] == ([0.9, 0.95], [0.5, 0.75])
    assert event.changed["optimizer.clip_grad"] == (1.0, 0.25)


def test_an_override_changes_what_the_next_step_does(ranks: Ranks, tmp_path: Path) -> None:
    """With learning rate 0 the loss on the same batch stays what it is, so the checkpoint's rate was not used."""
    write_data(tmp_path / "data", tokens=140)  # 8 samples: every global batch holds the same
    assert ranks.run(1, train, settings(tmp_path, steps=5)) == [0]
    keep_only(tmp_path / "run" / "checkpoints", 5)
    still = {"learning_rate": 0.0, "weight_decay": 0.0}
    frozen = settings(tmp_path, steps=8, optimizer=still, schedule={"kind": "constant", "min_learning_rate": 0.0})
    assert ranks.run(1, train, frozen) == [0]
    found = metrics(tmp_path / "run")
    assert found[6]["loss"] == pytest.approx(found[8]["loss"], rel=1e-6)
    assert found[4]["loss"] - found[5]["loss"] > 1e-3
