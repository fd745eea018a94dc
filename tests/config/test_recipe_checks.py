"""Stability knobs that contradict each other, the backend or the layout: both fields, their values, and the remedy."""

import pytest

from megatron_stable.config.checks import conflicts
from megatron_stable.config.load import load_config
from megatron_stable.config.recipes import RECIPES
from megatron_stable.config.schema import Config
from megatron_stable.errors import ConfigError

CLIP = {"attention_clip": [-0.03, 1.03]}
CONFLICTS = {
    "sdpa, cap": ({"attention": "sdpa", "attention_cap": 50}, {}, ["attention sdpa", "attention_cap 50", "=auto"]),
    "sdpa, clip": ({"attention": "sdpa", **CLIP}, {}, ["attention sdpa", "attention_clip [-0.03, 1.03]", "=auto"]),
    "flex, clip": ({"attention": "flex", **CLIP}, {}, ["attention flex", "attention_clip", "=null"]),
    "flash, clip": (
        {"attention": "flash", **CLIP},
        {"precision": {"dtype": "bf16"}},
        ["attention flash", "attention_clip", "=null"],
    ),
    "flash, fp32": ({"attention": "flash"}, {}, ["attention flash", "precision.dtype fp32", "precision.dtype=bf16"]),
    "flash, cap, dropout": (
        {"attention": "flash", "attention_cap": 50, "attention_dropout": 0.1},
        {"precision": {"dtype": "bf16"}},
        ["attention flash", "attention_dropout 0.1", "attention_cap 50", "attention_dropout=0"],
    ),
    "deepnorm, attention_input_norm": (
        {"recipe": "deepnorm", "attention_input_norm": True},
        {},
        ["model.deepnorm true", "model.attention_input_norm true", "set model.attention_input_norm=false"],
    ),
    "deepnorm, mlp_input_norm": (
        {"recipe": "deepnorm", "mlp_input_norm": True},
        {},
        ["model.deepnorm true", "model.mlp_input_norm true", "set model.mlp_input_norm=false"],
    ),
    "scope without a norm": (
        {"qk_norm_scope": "full"},
        {},
        ["model.qk_norm_scope full", "model.qk_norm false", "model.qk_norm=true"],
    ),
    "embedding_scale, embedding_norm": (
        {"embedding_scale": True, "embedding_norm": True},
        {},
        ["model.embedding_scale true", "model.embedding_norm true", "one of them"],
    ),
    "sigma_reparam, ZeRO-3": (
        {"recipe": "sigma_reparam"},
        {"parallel": {"zero_stage": 3}},
        ["model.sigma_reparam true", "parallel.zero_stage 3", "zero_stage=2"],
    ),
    "mu_loss, ZeRO-3": (
        {},
        {"parallel": {"zero_stage": 3}, "loss": {"mu_loss": 1e-4}},
        ["loss.mu_loss 0.0001", "parallel.zero_stage 3", "optimizer.mu_centering=true"],
    ),
    "qk_clip, qk_norm": (
        {"recipe": "qk_norm"},
        {"optimizer": {"qk_clip": 100}},
        ["optimizer.qk_clip 100", "model.qk_norm true", "set optimizer.qk_clip=null, or model.qk_norm=false"],
    ),
    "qk_clip, sigma_reparam": (
        {"recipe": "sigma_reparam"},
        {"optimizer": {"name": "muon", "qk_clip": 100}},
        ["optimizer.qk_clip 100", "model.sigma_reparam true", "model.sigma_reparam=false"],
    ),
    "alpha without qk_clip": (
        {},
        {"optimizer": {"qk_clip_alpha": 0.3}},
        ["optimizer.qk_clip_alpha 0.3", "optimizer.qk_clip null", "set optimizer.qk_clip to 100"],
    ),
    "mu_loss, mu_centering": (
        {},
        {"optimizer": {"mu_centering": True}, "loss": {"mu_loss": 1e-4}},
        ["loss.mu_loss 0.0001", "optimizer.mu_centering true", "one of them"],
    ),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_conflict(name):
    model, sections, words = CONFLICTS[name]
    (problem,) = conflicts(Config.model_validate({"model": model, **sections}))
    for word in words:
        assert word in problem.message
    for key in problem.keys:  # a problem is found by its keys where one of them was refused before
        assert key in problem.message


@pytest.mark.parametrize(
    ("model", "sections"),
    [
        ({"attention": "math", "attention_cap": 50, **CLIP}, {}),
        ({"attention": "flex", "attention_cap": 50}, {}),
        ({"attention": "flash", "attention_cap": 50}, {"precision": {"dtype": "bf16"}}),
        ({"attention": "flash", "attention_dropout": 0.1}, {"precision": {"dtype": "fp16"}}),
        ({"attention": "sdpa", "attention_dropout": 0.1, "recipe": "qkv_norm"}, {}),
        ({"deepnorm": True, "attention_input_norm": False, "mlp_input_norm": False}, {}),
        ({"v_norm": True, "qk_norm_scope": "full"}, {}),
        ({"recipe": "sigma_reparam"}, {"parallel": {"zero_stage": 2}}),
    ],
)
def test_no_conflict(model, sections):
    assert conflicts(Config.model_validate({"model": model, **sections})) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_backend_that_computes_it(recipe):
    assert conflicts(Config.model_validate({"model": {"recipe": recipe, "attention": "math"}}), 1) == []


@pytest.mark.parametrize(
    "override",
    [
        "model.attention_clip=[0.1, 1.03]",  # would lift masked entries above zero
        "model.attention_clip=[-0.03, 0.9]",
        "model.attention_clip=[-0.03]",
        "model.attention_cap=0",
        "model.attention_temperature=0",
        "model.layer_scale=-1",
        "model.embedding_gradient=0",
        "model.embedding_gradient=1.5",
        "model.final_logit_cap=-30",
        "model.qk_norm_scope=layer",
        "loss.mu_loss=-1",
    ],
)
def test_values_out_of_range_are_refused(override):
    with pytest.raises(ConfigError, match="is not allowed"):
        load_config(None, [override])
