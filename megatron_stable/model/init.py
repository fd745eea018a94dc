"""How weights are drawn: the rules that `model.init` names, and what a layout or a parametrization changes of them."""

from __future__ import annotations

from dataclasses import replace

from megatron_stable.config.parametrization import ModelMultipliers
from megatron_stable.config.schema import ModelConfig
from megatron_stable.parallel.shards import Init


def linear_init(config: ModelConfig, fan_in: int, factor: float = 1.0) -> Init:
    """A linear layer: truncated normal with std 1/sqrt(fan-in) (arXiv 2309.14322), or normal with a fixed std."""
    if config.init == "fan_in":
        return Init(std=fan_in**-0.5 * factor, truncated=True)
    return Init(std=config.init_std * factor)


def qkv_init(config: ModelConfig, by: ModelMultipliers) -> Init:
    """QKV, whose rows are, group by group, queries, key and value."""
    queries, d = config.heads // config.groups, config.head_dim
    factors = (0.0 if by.zero_query else 1.0, 1.0, deepnorm_gain(config))
    pattern = tuple(zip((queries * d, d, d), factors, strict=True)) if factors != (1.0, 1.0, 1.0) else ()
    return replace(linear_init(config, config.hidden, by.matrix_std), pattern=pattern)


def fc1_init(config: ModelConfig, by: ModelMultipliers) -> Init:
    """FC1."""
    return linear_init(config, config.hidden, by.matrix_std * deepnorm_gain(config))


def output_init(config: ModelConfig, fan_in: int, by: ModelMultipliers) -> Init:
    """Proj and FC2, which write to the residual stream: scaled by 1/sqrt(2 x layers) if asked (GPT-2)."""
    scale = (2 * config.layers) ** -0.5 if config.init_scaled_output else 1.0
    return linear_init(config, fan_in, by.matrix_std * deepnorm_gain(config) * scale)


def deepnorm_gain(config: ModelConfig) -> float:
    """beta = (8 x layers)^(-1/4) of DeepNorm (arXiv 2203.00555, decoder-only), for values, Proj, FC1 and FC2."""
    return (8 * config.layers) ** -0.25 if config.deepnorm else 1.0


def embedding_init(config: ModelConfig, rows: int | None = None) -> Init:
    """Token and position embeddings: normal with std 1/sqrt(hidden) (arXiv 2309.14322), or the fixed std."""
    return Init(std=config.hidden**-0.5 if config.init == "fan_in" else config.init_std, rows=rows)


def head_init(config: ModelConfig, rows: int, by: ModelMultipliers) -> Init:
    """The output head: a linear layer with padded rows."""
    return replace(linear_init(config, config.hidden, by.head_std), rows=rows)
