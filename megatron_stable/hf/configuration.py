"""The configuration of our class: what the model computes, with the usual names where there are any."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig


class MegatronStableConfig(PretrainedConfig):
    """What a model computes; :mod:`megatron_stable.config.schema` explains the knobs that bear the same names.

    Args:
        head_dim: Width of an attention head; 0: hidden_size / num_attention_heads.
        attention_scale: Factor of q k.
        residual_scale: Factor of what attention and MLP add to the residual stream.
        logits_scale: Factor of the output logits.
        layer_scale: Whether there are learned factors per feature, too.
        embedding_scale: Whether token embeddings are multiplied by sqrt(hidden_size).
    """

    model_type = "megatron_stable"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 0
    intermediate_size: int = 1024
    max_position_embeddings: int = 256
    tie_word_embeddings: bool = False
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    positions: str = "rope"
    rope_theta: float | None = 10000.0
    activation: str = "gelu"
    bias: bool = False
    attention_input_norm: bool = True
    mlp_input_norm: bool = True
    attention_output_norm: bool = False
    mlp_output_norm: bool = False
    deepnorm: bool = False
    layer_scale: bool = False
    qk_norm: bool = False
    v_norm: bool = False
    qk_norm_scope: str = "head"
    attention_scale: float = 0.125
    attention_cap: float | None = None
    attention_clip: list[float] | None = None
    embedding_scale: bool = False
    embedding_norm: bool = False
    final_logit_cap: float | None = None
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    parametrization: dict[str, Any] | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
