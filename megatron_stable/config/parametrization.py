"""How hyperparameters follow from those of a small base model: multipliers, as pure functions of the configuration.

With m = hidden / base_width, the factor of every fan-in, and d = layers / base_depth:

============================  ========  =========  =======  ==========
                              standard  mu_simple  mu_full  complete_p
============================  ========  =========  =======  ==========
rate of block matrices        1         1/m        1/m      1/m
rate of the head              1         1/m        1/m      1
coupled decay, block matrices 1         1          1        m
eps in blocks                 1         1          1        1/(m d)
eps elsewhere                 1         1          1        1/m
initial std, block matrices   1         1          1        1/sqrt(m)
initial std, head             1         1          1/sqrt m 1
initial query weights         as drawn  as drawn   zero     as drawn
logits of attention           q k/√d_h  q k/√d_h   q k/d_h  q k/d_h
output of a residual branch   1         1          1        1/d
output logits                 1         1          1        1/m
============================  ========  =========  =======  ==========

mu_simple and mu_full are muParam of arXiv 2309.14322 (base width 256), which starts from std 1/sqrt(fan-in), that is,
`model.init` fan_in; complete_p is arXiv 2505.01618 with alpha = 1 (base width 256, depth 2), which starts from one std
for all widths, `model.init` fixed. Embeddings keep the rate as it is; tied ones, too. Independent weight decay does not
scale with the rate in any of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_stable.config.schema import Config


@dataclass(frozen=True)
class OptimizerMultipliers:
    """Factors of a parameter's learning rate, coupled weight decay and eps."""

    learning_rate: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


@dataclass(frozen=True)
class ModelMultipliers:
    """What the model does differently.

    Attributes:
        attention_scale: Attention logits are this times q k.
        residual: Factor of what a block's attention and MLP add to the residual stream.
        logits: Factor of the output logits.
        matrix_std: Factor of the initial std of the matrices in blocks.
        head_std: Factor of the initial std of the head.
        zero_query: Whether the query rows of QKV start at zero.
    """

    attention_scale: float
    residual: float = 1.0
    logits: float = 1.0
    matrix_std: float = 1.0
    head_std: float = 1.0
    zero_query: bool = False


def width_ratio(config: Config) -> float:
    """m: how much wider than the base model; 1 under `standard`."""
    return 1.0 if _named(config) == "standard" else config.model.hidden / config.optimizer.base_width


def depth_ratio(config: Config) -> float:
    """d: how much deeper than the base model; 1 unless the parametrization scales with depth."""
    return config.model.layers / config.optimizer.base_depth if _named(config) == "complete_p" else 1.0


def optimizer_multipliers(config: Config, kind: str, in_block: bool) -> OptimizerMultipliers:
    """Of a parameter.

    Args:
        kind: "matrices", "norms", "biases", "embeddings" or "head".
        in_block: Whether it belongs to a Transformer block.
    """
    m, d, name = width_ratio(config), depth_ratio(config), _named(config)
    if name == "complete_p":
        eps = 1 / (m * d) if in_block else 1 / m
        return OptimizerMultipliers(1 / m, m, eps) if kind == "matrices" else OptimizerMultipliers(eps=eps)
    if name != "standard" and kind in ("matrices", "head"):
        return OptimizerMultipliers(learning_rate=1 / m)
    return OptimizerMultipliers()


def model_multipliers(config: Config) -> ModelMultipliers:
    """Of the whole model."""
    m, head_dim = width_ratio(config), config.model.head_dim
    if _named(config) == "complete_p":
        return ModelMultipliers(1 / head_dim, 1 / depth_ratio(config), 1 / m, matrix_std=m**-0.5)
    if _named(config) == "mu_full":
        return ModelMultipliers(1 / head_dim, head_std=m**-0.5, zero_query=True)
    return ModelMultipliers(head_dim**-0.5)


def _named(config: Config) -> str:
    return config.optimizer.parametrization
