"""Training with dropout: the same twice, and the same with recomputation, on layouts where its masks are at risk."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.layouts import assemble, make_config, train_on_ranks
from tests.harness.ranks import Ranks

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "zero3": (2, {"zero_stage": 3}),
    "tp2_sp_pp2": (4, {"tensor": 2, "sequence": True, "pipeline": 2}),
}


def train(ranks: Ranks, layout: str, recompute: str | int, seed: int = 3, rate: float = 0.2) -> list[dict[str, Any]]:
    world, parallel = LAYOUTS[layout]
    model = {"layers": 3, "dropout": rate, "attention_dropout": rate, "activation_checkpointing": recompute}
    config = make_config(model, parallel=parallel, run={"seed": seed})
    return ranks.run(world, train_on_ranks, config.model_dump(mode="json"), 2)


OFTEN = ("tp2_sp_pp2", "zero3")


@pytest.mark.parametrize("layout", [it if it in OFTEN else pytest.param(it, marks=pytest.mark.full) for it in LAYOUTS])
def test_recomputation_draws_the_same_masks(ranks: Ranks, layout: str) -> None:
    plain, again, recomputed = (train(ranks, layout, setting) for setting in ("none", "none", "full"))
    assert [r["metrics"] for r in plain] == [r["metrics"] for r in again], "the same run twice differs"
    for one, other in zip(plain[0]["metrics"], recomputed[0]["metrics"], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    weights = assemble(recomputed)
    for name, weight in assemble(plain).items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6, msg=name)


def test_dropout_is_on_in_training_and_off_in_evaluation(ranks: Ranks) -> None:
    config = make_config({"layers": 1}).model_dump(mode="json")
    config["optimizer"]["learning_rate"] = config["schedule"]["min_learning_rate"] = 0.0
    dropped = {**config, "model": {**config["model"], "dropout": 0.3, "attention_dropout": 0.3}}
    (without,) = ranks.run(1, train_on_ranks, config, 2)
    (with_dropout,) = ranks.run(1, train_on_ranks, dropped, 2)
    assert with_dropout["evaluation"] == pytest.approx(without["evaluation"], rel=1e-6)
    assert abs(with_dropout["metrics"][0]["loss"] - without["metrics"][0]["loss"]) > 1e-3
