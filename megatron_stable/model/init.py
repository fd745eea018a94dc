"""How weights are drawn: the rules that `model.init` names."""

from __future__ import annotations

from megatron_stable.config.schema import ModelConfig
from megatron_stable.parallel.parameters import Init


def linear_init(config: ModelConfig, fan_in: int) -> Init:
    """A linear layer: truncated normal with std 1/sqrt(fan-in) (arXiv 2309.14322), or normal with a fixed std."""
    if config.init == "fan_in":
        return Init(std=fan_in**-0.5, truncated=True)
    return Init(std=config.init_std)


def output_init(config: ModelConfig, fan_in: int) -> Init:
    """Proj and FC2, which write to the residual stream: scaled by 1/sqrt(2 x layers) if asked (GPT-2)."""
    plain = linear_init(config, fan_in)
    scale = (2 * config.layers) ** -0.5 if config.init_scaled_output else 1.0
    return Init(std=plain.std * scale, truncated=plain.truncated)


def embedding_init(config: ModelConfig, rows: int | None = None) -> Init:
    """Token and position embeddings: normal with std 1/sqrt(hidden) (arXiv 2309.14322), or the fixed std."""
    return Init(std=config.hidden**-0.5 if config.init == "fan_in" else config.init_std, rows=rows)


def head_init(config: ModelConfig, rows: int) -> Init:
    """The output head: a linear layer with padded rows."""
    plain = linear_init(config, config.hidden)
    return Init(std=plain.std, truncated=plain.truncated, rows=rows)
