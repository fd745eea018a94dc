"""Every recipe and every knob is the same function on every layout, and stays so while it trains: TP x PP x SP against
the plain single-process reference in float64; resume bit for bit where a recipe has state of its own."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest

from megatron_stable.config.checks import conflicts
from megatron_stable.config.recipes import RECIPES
from megatron_stable.config.schema import Config
from tests.engine.layouts import (
    assemble,
    initial_parameters,
    make_config,
    train_many_on_ranks,
    train_reference,
    unpadded,
    update_error,
)
from tests.harness.ranks import Ranks
from tests.reference.optimizer import Trained

STEPS, RATE = 3, 3e-3
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "pp2": {"pipeline": 2},
    "tp2": {"tensor": 2},
    "tp2_sp": {"tensor": 2, "sequence": True},
    "tp4": {"tensor": 4},
    "tp4_sp": {"tensor": 4, "sequence": True},
    "tp2_pp2": {"tensor": 2, "pipeline": 2},
    "tp2_pp2_sp": {"tensor": 2, "pipeline": 2, "sequence": True},
    "tp4_pp2": {"tensor": 4, "pipeline": 2},
    "tp4_pp2_sp": {"tensor": 4, "pipeline": 2, "sequence": True},
}
QUICK = ("tp2_sp", "pp2")  # every pair of options meets in test_equivalence.py
# knobs that no recipe turns, or that meet others where ranks share work: fields of `model`, and of `loss` beside them
KNOBS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mlp_input_norm": ({"mlp_input_norm": False}, {}),
    "layer_scale_large": ({"layer_scale": 0.5, "bias": True}, {}),
    "full_layernorm_bias": ({"qk_norm": True, "v_norm": True, "qk_norm_scope": "full", "bias": True}, {}),
    "sigma_swiglu": ({"sigma_reparam": True, "activation": "swiglu", "qk_norm": True}, {}),
    "temperature_cap_clip": (
        {"attention_temperature": 2.0, "attention_cap": 1.0, "attention_clip": (-0.05, 1.1)},
        {},
    ),
    "geglu": ({"activation": "geglu", "norm": "rmsnorm"}, {}),
    "embedding_norm_learned": ({"embedding_norm": True, "positions": "learned", "bias": True}, {}),
    "embedding_gradient_scale": ({"embedding_gradient": 0.1, "embedding_scale": True, "positions": "learned"}, {}),
    "head_width": ({"head_width": 12, "qk_norm": True, "v_norm": True}, {}),
    "final_logit_cap": ({"final_logit_cap": 1.0}, {"z_loss": 0.1}),
    "mu_loss": ({}, {"mu_loss": 10.0}),
    "mu_loss_tied_cap": ({"tied_embeddings": True, "final_logit_cap": 2.0}, {"mu_loss": 10.0}),
}
CASES = {name: ({"recipe": name}, {}) for name in RECIPES} | KNOBS


def to_config(name: str, layout: str) -> Config:
    model, loss = CASES[name]
    batch = {"global_size": 8, "micro_size": 4}
    return make_config({"layers": 2, **model}, loss=loss, batch=batch, parallel=LAYOUTS[layout])


@lru_cache(maxsize=1)
def _trained(ranks: Ranks, layout: str) -> dict[str, list[dict[str, Any]]]:
    """What each rank found for each case, all cases in one job."""
    parallel = LAYOUTS[layout]
    world = parallel.get("tensor", 1) * parallel.get("pipeline", 1)
    configs = {name: to_config(name, layout).model_dump(mode="json") for name in CASES}
    by_rank = ranks.run(world, train_many_on_ranks, configs, STEPS, timeout=280)
    return {name: [results[name] for results in by_rank] for name in CASES}


@lru_cache(maxsize=64)
def _reference(name: str) -> Trained:
    return train_reference(to_config(name, "tp1"), STEPS)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "layout", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS]
)
def test_recipe_equals_the_reference_on_every_layout(ranks: Ranks, layout: str, name: str) -> None:
    config = to_config(name, layout)
    results, expected = _trained(ranks, layout)[name], _reference(name)
    assert all(result["metrics"] == results[0]["metrics"] for result in results), "ranks disagree about the metrics"
    losses = [m["loss"] + m["z_loss"] + m["mu_loss"] for m in results[0]["metrics"]]
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    assert [m["grad_norm"] for m in results[0]["metrics"]] == pytest.approx(expected.grad_norms, rel=1e-5)
    final = {key: unpadded(key, value).double() for key, value in assemble(results).items()}
    assert set(final) == set(expected.parameters)
    start = initial_parameters(config)
    for key, value in final.items():
        error = update_error(value, expected.parameters[key], start[key], RATE)
        assert error < 1e-3, f"the update of {key} is off by {error:.2e}"


def test_cases_have_no_conflicts_and_each_makes_a_difference() -> None:
    baseline = _reference("baseline")
    for name in CASES:
        assert conflicts(to_config(name, "tp4_pp2_sp"), 8) == []
        if name != "baseline":
            same = _reference(name).losses == pytest.approx(baseline.losses, rel=1e-9)
            assert not same, f"{name} trains like the baseline: nothing is tested"
