"""How attention is computed: backends that give the same numbers, and which of them a recipe and a device allow."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_stable.config.attention import limits
from megatron_stable.config.schema import ModelConfig
from megatron_stable.errors import ConfigError
from megatron_stable.model.elementwise import soft_cap


class Scores(NamedTuple):
    """From queries and keys to the weights of the values: clip(softmax(cap(scale x q k))).

    Attributes:
        scale: Factor of q k.
        cap: c of c x tanh(logit / c).
        clip: [gamma, zeta] of clip((zeta - gamma) x softmax + gamma, 0, 1); what is masked stays 0, as gamma <= 0.
    """

    scale: float
    cap: float | None = None
    clip: tuple[float, float] | None = None


# q, k, v: [b, heads, s, d] (k and v may have fewer heads), scores, dropout -> [b, heads, s, d]
Backend = Callable[[Tensor, Tensor, Tensor, Scores, float], Tensor]


def math_attention(q: Tensor, k: Tensor, v: Tensor, scores: Scores, dropout: float) -> Tensor:
    """The reference: every step in plain sight, the s x s probabilities in memory; logits and softmax are fp32."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(wide) @ k.to(wide).transpose(-2, -1)) * scores.scale  # [b, heads, s, s]
    if scores.cap is not None:
        logits = soft_cap(logits, scores.cap)
    future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    probabilities = logits.masked_fill(future, -torch.inf).softmax(-1)
    if scores.clip is not None:
        gamma, zeta = scores.clip
        probabilities = ((zeta - gamma) * probabilities + gamma).clamp(0, 1)
    return F.dropout(probabilities, dropout).to(v.dtype) @ v


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, scores: Scores, dropout: float) -> Tensor:
    """PyTorch's fused attention; it has no cap and no clip."""
    assert scores.cap is None and scores.clip is None
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=True, scale=scores.scale, enable_gqa=grouped
    )


def flex_attention(q: Tensor, k: Tensor, v: Tensor, scores: Scores, dropout: float) -> Tensor:
    """FlexAttention: a fused kernel that carries the cap; CUDA only (it has no backward on the CPU), no dropout."""
    from torch.nn.attention import flex_attention as flex

    assert not dropout and scores.clip is None
    # within a compiled block it is a part of its graph
    attend = flex.flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    score_mod = None if scores.cap is None else _score_mod(scores.cap)
    grouped = q.shape[1] != k.shape[1]
    mask = causal_mask(q.shape[2], str(q.device))
    out: Tensor = attend(q, k, v, score_mod, mask, scale=scores.scale, enable_gqa=grouped)
    return out


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention import flex_attention as flex

    return torch.compile(flex.flex_attention, dynamic=False)


_MASKS: dict[tuple[int, str], Any] = {}


def causal_mask(length: int, device: str) -> Any:
    """FlexAttention's mask, made once; a compiled block has to find it there, else it makes it anew in each forward."""
    from torch.nn.attention import flex_attention as flex

    if (length, device) not in _MASKS:
        _MASKS[length, device] = flex.create_block_mask(
            lambda b, h, query, key: query >= key, None, None, length, length, device=device
        )
    return _MASKS[length, device]


def _capped(cap: float, score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return soft_cap(score, cap)


@lru_cache(maxsize=8)
def _score_mod(cap: float) -> Callable[..., Tensor]:
    return partial(_capped, cap)  # one object per cap: a new one would compile the kernel anew


def flash_attention(q: Tensor, k: Tensor, v: Tensor, scores: Scores, dropout: float) -> Tensor:
    """The package flash-attn (arXiv 2307.08691): CUDA, bf16 and fp16; it carries the cap, though not with dropout."""
    from flash_attn import flash_attn_func

    assert scores.clip is None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out: Tensor = flash_attn_func(
        q,
        k,
        v,
        dropout_p=dropout,
        softmax_scale=scores.scale,
        causal=True,
        softcap=scores.cap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out.transpose(1, 2)


BACKENDS: dict[str, Backend] = {
    "math": math_attention,
    "sdpa": sdpa_attention,
    "flex": flex_attention,
    "flash": flash_attention,
}
FASTEST = ("sdpa", "flex")  # that come with PyTorch, the faster first
NEEDS_CUDA = {"flex": "it has no backward on a CPU", "flash": "flash-attn is made for it"}


class Choice(NamedTuple):
    """A backend, and why it was taken."""

    name: str
    reason: str


def choose_backend(config: ModelConfig, device: str) -> Choice:
    """The fastest backend that computes ``config`` exactly on ``device`` ("cpu", "cuda"), or the one it names.

    Raises:
        ConfigError: The one it names does not run here.
    """
    if config.attention != "auto":
        _refuse_absent(config.attention, device)
        return Choice(config.attention, "the configuration names it")
    reasons = []
    for name in FASTEST:
        wrong = [f"cannot compute {limit}" for limit in limits(name, config)]
        if name in NEEDS_CUDA and device != "cuda":
            wrong.append(f"needs a CUDA GPU, as {NEEDS_CUDA[name]}")
        if not wrong:
            return Choice(name, "it is the fastest that computes all of the recipe here")
        reasons.append(f"{name} {' and '.join(wrong)}")
    return Choice("math", "; ".join(reasons))


def _refuse_absent(name: str, device: str) -> None:
    if name in NEEDS_CUDA and device != "cuda":
        raise ConfigError(f"model.attention {name} needs a CUDA GPU, as {NEEDS_CUDA[name]}: set model.attention=auto")
    if name == "flash" and find_spec("flash_attn") is None:
        raise ConfigError(
            "model.attention flash needs the package flash-attn, which is not installed: "
            "install it (pip install flash-attn), or set model.attention=auto"
        )


@torch.no_grad()
def max_attention_logits(q: Tensor, k: Tensor, scale: float, chunk: int = 128) -> Tensor:
    """The largest attention logit of each head, before any cap, over the keys that each query may see.

    In memory are the logits of ``chunk`` queries at a time, not s x s. Products of bf16 are rounded to bf16, which is
    enough to compare with a threshold; those of fp16 are fp32, as they may not fit.

    Args:
        q: ``[b, heads, s, d]``.
        k: ``[b, heads, s, d]``, or fewer heads, each for several of ``q``'s.
        scale: Factor of q k.

    Returns:
        ``[heads]``, fp32 (fp64 for fp64 inputs).
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    if q.dtype == torch.float16:
        q, k = q.float(), k.float()
    length = q.shape[2]
    top = torch.full(q.shape[1:2], -torch.inf, dtype=wide, device=q.device)
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        products = q[:, :, start:stop] @ k[:, :, :stop].transpose(-2, -1)
        future = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device).triu(1 + start)
        top = torch.maximum(top, products.masked_fill(future, -torch.inf).amax((0, 2, 3)).to(wide))
    return top * scale
