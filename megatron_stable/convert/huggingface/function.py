"""What a model computes, apart from how it is trained: the knobs that a class of `transformers` must be able to follow.

Dropout, initialisation, the scale of the embedding's gradient, backends and recomputation change no output of a trained
model, and sigmaReparam's factors are folded into its weights. All else in ``model`` is here.
"""

from __future__ import annotations

from typing import Any

from megatron_stable.config.load import parse_config
from megatron_stable.config.parametrization import model_multipliers
from megatron_stable.config.schema import Config, ModelConfig

# fields of `model` that do not change what a trained model computes
TRAINING = {
    "size", "recipe", "dropout", "attention_dropout", "init", "init_std", "init_scaled_output", "sigma_reparam",
    "embedding_gradient", "attention", "activation_checkpointing", "compile",
}  # fmt: skip
# the knobs of a plain pre-norm decoder; a family says where it differs
PLAIN: dict[str, Any] = {
    "attention_input_norm": True,
    "mlp_input_norm": True,
    "attention_output_norm": False,
    "mlp_output_norm": False,
    "deepnorm": False,
    "layer_scale": False,
    "qk_norm": False,
    "v_norm": False,
    "qk_norm_scope": "head",
    "attention_cap": None,
    "attention_clip": None,
    "embedding_scale": False,
    "embedding_norm": False,
    "final_logit_cap": None,
    "attention_scale": lambda knobs: knobs["head_width"] ** -0.5,
    "residual_scale": 1.0,
    "logits_scale": 1.0,
}
_DERIVED = {
    "attention_scale": "model.attention_temperature or optimizer.parametrization",
    "residual_scale": "optimizer.parametrization",
    "logits_scale": "optimizer.parametrization",
}


def knobs_of(config: Config) -> dict[str, Any]:
    """What the model computes, by knob: fields of ``model``, resolved, and the multipliers of the parametrization."""
    model, by = config.model, model_multipliers(config)
    knobs = {name: getattr(model, name) for name in ModelConfig.model_fields if name not in TRAINING}
    del knobs["attention_temperature"]
    knobs |= {
        "kv_heads": model.groups,
        "head_width": model.head_dim,
        "ffn_hidden": model.ffn,
        "layer_scale": model.layer_scale is not None,  # the factors themselves are weights
        "qk_norm_scope": model.qk_norm_scope if model.qk_norm or model.v_norm else "head",
        "attention_scale": by.attention_scale * model.attention_temperature,
        "residual_scale": by.residual,
        "logits_scale": by.logits,
    }
    if model.positions != "rope":
        knobs["rope_theta"] = None
    return knobs


def config_of(knobs: dict[str, Any], optimizer: dict[str, Any]) -> Config:
    """A configuration that computes this.

    Args:
        knobs: As :func:`knobs_of` has them.
        optimizer: The parametrization, where it is not the standard one: fields of ``optimizer``.

    Raises:
        ConfigError: There is none.
    """
    model = {name: value for name, value in knobs.items() if name not in _DERIVED}
    model |= {"size": None, "layer_scale": 1e-4 if knobs["layer_scale"] else None}
    if model["rope_theta"] is None:
        del model["rope_theta"]
    if model["head_width"] * model["heads"] == model["hidden"]:
        model["head_width"] = None
    by = model_multipliers(parse_config({"model": model, "optimizer": optimizer}))
    temperature = knobs["attention_scale"] / by.attention_scale
    model["attention_temperature"] = 1.0 if abs(temperature - 1) < 1e-12 else temperature
    return parse_config({"model": model, "optimizer": optimizer})


def usual_width(knobs: dict[str, Any]) -> int:
    """Width of an attention head that nobody has chosen."""
    width: int = knobs["hidden"] // knobs["heads"]
    return width


def called(knob: str) -> str:
    """What the user knows a knob by."""
    return _DERIVED.get(knob, f"model.{knob}")
