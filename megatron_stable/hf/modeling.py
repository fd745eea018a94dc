"""Our model as a class of `transformers`: cache, padding, generation, gradient checkpointing.

The equations are those of :mod:`megatron_stable.model.block`, which draws them, on one device; sigmaReparam is folded
into the weights. A norm or factor that the configuration does not have is the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megatron_stable.config.schema import GATED
from megatron_stable.hf.configuration import MegatronStableConfig
from megatron_stable.model import mlp
from megatron_stable.model.elementwise import soft_cap

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {**mlp.ACTIVATIONS, "swiglu": F.silu, "geglu": mlp.gelu}


def make_norm(config: MegatronStableConfig, size: int, present: bool = True) -> nn.Module:
    """LayerNorm or RMSNorm over ``size`` features, or the identity."""
    if not present:
        return nn.Identity()
    if config.norm == "rmsnorm":
        return nn.RMSNorm(size, config.norm_eps)
    return nn.LayerNorm(size, config.norm_eps, bias=config.bias)


class LayerScale(nn.Module):
    """A learned factor per feature (arXiv 2103.17239)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., size]`` to the same."""
        return x * self.weight


def rotary(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin ``[b, 1, s, width]`` in fp32 of the angles of ``positions [b, s]``, as the trainer has them."""
    frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width)
    angles = (positions.double().unsqueeze(-1) * frequencies).repeat(1, 1, 2).unsqueeze(1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``[b, heads, s, d]``: dimension i is paired with i + d/2; computed in fp32."""
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


def plain_attention(
    module: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """clip(softmax(cap(scale x q k))) v, every step in plain sight; logits and softmax are fp32."""
    config = module.config
    k, v = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (k, v))
    logits = (q.float() @ k.float().transpose(-2, -1)) * module.scaling
    if config.attention_cap is not None:
        logits = soft_cap(logits, config.attention_cap)
    if mask is not None:
        logits = logits + mask
    weights = logits.softmax(-1)
    if config.attention_clip is not None:
        gamma, zeta = config.attention_clip
        weights = ((zeta - gamma) * weights + gamma).clamp(0, 1)
    weights = weights.to(v.dtype)
    return (weights @ v).transpose(1, 2).contiguous(), weights


class Attention(nn.Module):
    """Causal self-attention with grouped queries."""

    is_causal = True

    def __init__(self, config: MegatronStableConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.scaling = config, layer_idx, config.attention_scale
        self.heads, self.groups, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.num_key_value_groups = self.heads // self.groups
        self.full = config.qk_norm_scope == "full"
        h, bias = config.hidden_size, config.bias
        self.q_proj = nn.Linear(h, self.heads * d, bias)
        self.k_proj = nn.Linear(h, self.groups * d, bias)
        self.v_proj = nn.Linear(h, self.groups * d, bias)
        self.o_proj = nn.Linear(self.heads * d, h, bias)
        queries, keys = (self.heads * d, self.groups * d) if self.full else (d, d)
        self.q_norm = make_norm(config, queries, config.qk_norm)
        self.k_norm = make_norm(config, keys, config.qk_norm)
        self.v_norm = make_norm(config, keys, config.v_norm)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        turn: tuple[Tensor, Tensor] | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        """``[b, s, h]`` to the same."""
        q = self._heads(self.q_proj(x), self.q_norm)
        k = self._heads(self.k_proj(x), self.k_norm)
        v = self._heads(self.v_proj(x), self.v_norm)
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, plain_attention)
        y, _ = attend(self, q, k, v, mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(y.flatten(2))

    def _heads(self, x: Tensor, norm: nn.Module) -> Tensor:
        """``[b, s, n d]`` to ``[b, n, s, d]``, normed in all or per head."""
        split = x.unflatten(-1, (-1, self.config.head_dim))
        split = norm(x).view_as(split) if self.full else norm(split)
        return split.transpose(1, 2)


class MLP(nn.Module):
    """``down(activation(up(x)))``, where gated ``down(activation(gate(x)) * up(x))``."""

    def __init__(self, config: MegatronStableConfig) -> None:
        super().__init__()
        h, f, bias = config.hidden_size, config.intermediate_size, config.bias
        self.gate_proj = nn.Linear(h, f, bias) if config.activation in GATED else None
        self.up_proj, self.down_proj = nn.Linear(h, f, bias), nn.Linear(f, h, bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """``[b, s, h]`` to the same."""
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(GradientCheckpointingLayer):
    """One block: see :mod:`megatron_stable.model.block`."""

    def __init__(self, config: MegatronStableConfig, layer_idx: int) -> None:
        super().__init__()
        h = config.hidden_size
        self.skip = (2 * config.num_hidden_layers) ** 0.25 if config.deepnorm else 1.0  # arXiv 2203.00555
        self.branch = config.residual_scale
        self.attention_input_norm = make_norm(config, h, config.attention_input_norm)
        self.self_attn = Attention(config, layer_idx)
        self.attention_output_norm = make_norm(config, h, config.attention_output_norm)
        self.attention_layer_scale = LayerScale(h) if config.layer_scale else nn.Identity()
        self.attention_post_norm = make_norm(config, h, config.deepnorm)
        self.mlp_input_norm = make_norm(config, h, config.mlp_input_norm)
        self.mlp = MLP(config)
        self.mlp_output_norm = make_norm(config, h, config.mlp_output_norm)
        self.mlp_layer_scale = LayerScale(h) if config.layer_scale else nn.Identity()
        self.mlp_post_norm = make_norm(config, h, config.deepnorm)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[b, s, h]`` to the same."""
        y = self.attention_output_norm(self.self_attn(self.attention_input_norm(x), *args, **kwargs))
        x = self.attention_post_norm(self.skip * x + self.branch * self.attention_layer_scale(y))
        y = self.mlp_output_norm(self.mlp(self.mlp_input_norm(x)))
        return self.mlp_post_norm(self.skip * x + self.branch * self.mlp_layer_scale(y))


class MegatronStablePreTrainedModel(PreTrainedModel):
    """What both classes share."""

    config_class = MegatronStableConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: MegatronStableConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.attention_cap is not None or config.attention_clip is not None:
            config._attn_implementation = "eager"  # fused kernels have neither

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LayerScale):
            init.constant_(module.weight, 1e-4)


class MegatronStableModel(MegatronStablePreTrainedModel):
    """The decoder: token ids to the final hidden state."""

    def __init__(self, config: MegatronStableConfig) -> None:
        super().__init__(config)
        h = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, h)
        self.embed_norm = make_norm(config, h, config.embedding_norm)
        learned = config.positions == "learned"
        self.embed_positions = nn.Embedding(config.max_position_embeddings, h) if learned else None
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config, h, not config.deepnorm)  # the last norm of a post-norm block is the final one
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The final hidden state ``[b, s, h]`` of ``input_ids [b, s]``, or of ``inputs_embeds``.

        Raises:
            ValueError: Both of them are given, or neither.
        """
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not (self.gradient_checkpointing and self.training):
            past_key_values = DynamicCache(config=config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(x.shape[1], device=x.device) + seen).unsqueeze(0)
        mask = create_causal_mask(config, x, attention_mask, past_key_values, position_ids)
        if config.embedding_scale:
            x = x * config.hidden_size**0.5
        x = self.embed_norm(x)
        if self.embed_positions is not None:
            x = x + self.embed_positions(position_ids)
        turn = rotary(position_ids, config.head_dim, config.rope_theta) if config.positions == "rope" else None
        states = [x]
        for layer in self.layers:
            x = layer(x, mask, turn, past_key_values=past_key_values)
            states.append(x)
        x = states[-1] = self.norm(x)
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(states) if wanted else None,
        )


class MegatronStableForCausalLM(MegatronStablePreTrainedModel, GenerationMixin):
    """The language model: token ids to logits, and a loss if there are labels."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MegatronStableConfig) -> None:
        super().__init__(config)
        self.model = MegatronStableModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[b, s, vocab_size]``, of the last ``logits_to_keep`` positions (0: of all).

        ``labels`` ``[b, s]`` are the ``input_ids``, -100 where there is no loss; they are shifted here.
        """
        kwargs.pop("return_dict", None)
        found = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_hidden_states
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, kept] * self.config.logits_scale)
        if self.config.final_logit_cap is not None:
            logits = soft_cap(logits.float(), self.config.final_logit_cap).to(logits.dtype)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=found.past_key_values, hidden_states=found.hidden_states
        )
