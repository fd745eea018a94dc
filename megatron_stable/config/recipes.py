"""Recipes: named sets of stability knobs, by the names of the papers.

A recipe is data. Each value is a field of :class:`~megatron_stable.config.schema.ModelConfig`; a field
given beside ``recipe`` in the YAML overrides the recipe's value.
"""

from typing import Any

_OUTPUT_NORMS = {"attention_output_norm": True, "mlp_output_norm": True}
_NO_INPUT_NORMS = {"attention_input_norm": False, "mlp_input_norm": False}

RECIPES: dict[str, dict[str, Any]] = {
    "baseline": {},
    # arXiv 2410.16682, by its names
    "soft_temp": {"attention_temperature": 0.5},
    "soft_cap": {"attention_cap": 50.0},
    "soft_clip": {"attention_clip": [-0.03, 1.03]},
    "sigma_reparam": {"sigma_reparam": True},
    "layer_scale": {"layer_scale": 1e-4},
    "qk_norm": {"qk_norm": True},
    "qk_fc_norm": {"qk_norm": True, **_OUTPUT_NORMS},
    "qkv_norm": {"qk_norm": True, "v_norm": True, "attention_input_norm": False},
    "qk_norm_cap": {"qk_norm": True, "attention_cap": 50.0},
    # layouts of the norms
    "olmo2": {"norm": "rmsnorm", "qk_norm": True, "qk_norm_scope": "full", **_NO_INPUT_NORMS, **_OUTPUT_NORMS},
    "peri_ln": {**_OUTPUT_NORMS},
    "sandwich": {**_OUTPUT_NORMS},
    "gemma2": {
        "norm": "rmsnorm",
        **_OUTPUT_NORMS,
        "attention_cap": 50.0,
        "final_logit_cap": 30.0,
        "embedding_scale": True,
    },
    "deepnorm": {"deepnorm": True, **_NO_INPUT_NORMS},
}
