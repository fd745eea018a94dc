"""Recipes: named sets of stability knobs, by the names of the papers.

A recipe is data. Each value is a field of :class:`~megatron_stable.config.schema.ModelConfig`; a field
given beside ``recipe`` in the YAML overrides the recipe's value.
"""

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "baseline": {},
    # arXiv 2410.16682, after 2302.05442: LayerNorm on queries and keys, per head
    "qk_norm": {"qk_norm": True},
    # arXiv 2410.16682: QK-norm and c * tanh(logit / c) before the softmax
    "qk_norm_cap": {"qk_norm": True, "attention_cap": 50.0},
}
