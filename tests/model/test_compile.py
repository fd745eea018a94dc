"""Compiled blocks train like plain ones, alone and with their collectives."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.layouts import assemble, make_config, train_on_ranks
from tests.harness.ranks import Ranks

STEPS = 2


def both(ranks: Ranks, world: int, model: dict[str, Any], parallel: dict[str, Any], **optimizer: Any) -> None:
    runs = []
    for compiled in (False, True):
        shape = {"layers": 1, "recipe": "qk_norm_cap", **model, "compile": compiled}
        config = make_config(shape, parallel=parallel, optimizer=optimizer)
        runs.append(ranks.run(world, train_on_ranks, config.model_dump(mode="json"), STEPS, timeout=240))
    plain, compiled_run = runs
    for before, after in zip(plain[0]["metrics"], compiled_run[0]["metrics"], strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-4)
    assert compiled_run[0]["evaluation"] == pytest.approx(plain[0]["evaluation"], rel=1e-5)
    weights = assemble(compiled_run)
    for name, weight in assemble(plain).items():
        assert (weights[name] - weight).norm() < 1e-4 * weight.norm() + 1e-5, name


@pytest.mark.full
def test_compiled_model_trains_like_the_plain_one(ranks: Ranks) -> None:
    both(ranks, 1, {"kv_heads": 2, "activation": "swiglu"}, {})


@pytest.mark.full
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_compiled_model_trains_like_the_plain_one_on_tensor_parallel_ranks(ranks: Ranks, recompute: str) -> None:
    both(ranks, 2, {"activation_checkpointing": recompute, "bias": True}, {"tensor": 2, "sequence": True})


@pytest.mark.full
@pytest.mark.parametrize(
    ("world", "model", "parallel"),
    [
        (1, {"recipe": "sigma_reparam", "activation": "swiglu"}, {}),
        (2, {"recipe": "sigma_reparam"}, {"tensor": 2, "sequence": True}),
        (2, {"recipe": "olmo2", "layer_scale": 0.3}, {"tensor": 2, "sequence": True}),
        (1, {"recipe": "deepnorm", "attention_clip": (-0.03, 1.03)}, {}),
    ],
    ids=["sigma_reparam", "sigma_reparam_tp2", "olmo2_layer_scale_tp2", "deepnorm_clip"],
)
def test_compiled_recipes_train_like_the_plain_ones(
    ranks: Ranks, world: int, model: dict[str, Any], parallel: dict[str, Any]
) -> None:
    both(ranks, world, model, parallel)


@pytest.mark.full
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_compiled_attention_records_its_logits_for_qk_clip(ranks: Ranks, recompute: str) -> None:
    both(ranks, 2, {"recipe": "soft_cap", "activation_checkpointing": recompute}, {"tensor": 2}, qk_clip=1.0)
