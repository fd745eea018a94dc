"""What surgery can change of a trained model, and what it cannot, by the name of the knob."""

from __future__ import annotations

from typing import Any

from megatron_stable.config.problems import Problem
from megatron_stable.config.recipes import RECIPES
from megatron_stable.config.schema import Config

# norms of a block, by the knob that each hangs on
NORMS = {
    "attention_input_norm": ("attention_input_norm",),
    "qk_norm": ("attention.q_norm", "attention.k_norm"),
    "v_norm": ("attention.v_norm",),
    "attention_output_norm": ("attention_output_norm",),
    "mlp_input_norm": ("mlp_input_norm",),
    "mlp_output_norm": ("mlp_output_norm",),
}
OPERABLE = {
    *NORMS, "qk_norm_scope", "layer_scale", "attention_cap", "final_logit_cap", "tied_embeddings", "vocab_size",
    "rope_theta", "sequence_length", "layers",
}  # fmt: skip
# fields of `model` that may change from one start of a run to the next: names and what does not change the function
FREE = {
    "size", "recipe", "attention", "activation_checkpointing", "compile", "dropout", "attention_dropout",
    "embedding_gradient",
}  # fmt: skip
FIXED = {"optimizer.parametrization", "optimizer.base_width", "optimizer.base_depth", "run.seed"}


def changes(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """What differs, ``{"section.field": (before, after)}``, but for where the run goes."""
    old, new = before.by_key(), after.by_key()
    return {key: (old[key], new[key]) for key in new if old[key] != new[key] and key != "run.directory"}


def recipe_values(recipe: str, config: Config) -> dict[str, Any]:
    """A recipe's knobs by key, as far as the model does not have them."""
    model = config.model.model_dump(mode="json")
    return {f"model.{name}": value for name, value in RECIPES[recipe].items() if model[name] != value}


def refusals(before: Config, after: Config) -> list[Problem]:
    """Why a model of ``before`` cannot be made one of ``after``; empty: it can."""
    changed = changes(before, after)
    found = [
        _cannot(key, changed, "there is no operation for it; set it as it was")
        for key in changed
        if key in FIXED or (key.startswith("model.") and key.split(".")[1] not in OPERABLE | FREE)
    ]
    old, new = before.model, after.model
    norms = {name for name in NORMS if getattr(old, name) != getattr(new, name)}
    if old.qk_norm_scope != new.qk_norm_scope and ((old.qk_norm and new.qk_norm) or (old.v_norm and new.v_norm)):
        found.append(_cannot("model.qk_norm_scope", changed, "there are norms of that scope; remove them first"))
    if not old.tied_embeddings and new.tied_embeddings:
        found.append(_cannot("model.tied_embeddings", changed, "two matrices cannot be made one"))
    if (old.vocab_size or 0) > (new.vocab_size or 0):
        found.append(_cannot("model.vocab_size", changed, "a vocabulary can only grow"))
    if new.layers < old.layers:
        found.append(_cannot("model.layers", changed, "blocks can only be added"))
    if new.layers > old.layers and (old.deepnorm or after.optimizer.parametrization == "complete_p"):
        why = "model.deepnorm" if old.deepnorm else "optimizer.parametrization complete_p"
        found.append(_cannot("model.layers", changed, f"with {why} the factors of all blocks depend on their number"))
    if old.deepnorm and norms & {"attention_output_norm", "mlp_output_norm", "attention_input_norm", "mlp_input_norm"}:
        found.append(_cannot(f"model.{min(norms)}", changed, "model.deepnorm has its norms elsewhere"))
    if old.sigma_reparam:
        folded = [name for name in sorted(norms) if getattr(old, name)]
        folded += ["layer_scale"] * (old.layer_scale is not None and new.layer_scale is None)
        folded += ["layers"] * (new.layers > old.layers)
        why = "it would have to be folded into weights that model.sigma_reparam normalises"
        found += [_cannot(f"model.{name}", changed, why) for name in folded]
    return found


def _cannot(key: str, changed: dict[str, tuple[Any, Any]], why: str) -> Problem:
    before, after = changed[key]
    return Problem((key,), f"{key}: surgery cannot change {before} to {after}: {why}")
