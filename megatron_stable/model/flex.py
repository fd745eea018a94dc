"""FlexAttention, PyTorch's compiled attention: the kernel that carries a cap where flash-attn is not there."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from megatron_stable.model.scores import Scores

# under a causal mask each query sees a key, and blocks of keys follow each other: it need not check and look that up
OPTIONS = {"ROWS_GUARANTEED_SAFE": True, "BLOCKS_ARE_CONTIGUOUS": True}


def flex_attention(q: Tensor, k: Tensor, v: Tensor, scores: Scores, dropout: float) -> Tensor:
    """A fused kernel that carries the cap; CUDA only (it has no backward on the CPU), no dropout."""
    from torch.nn.attention import flex_attention as flex

    assert not dropout and scores.clip is None
    # within a compiled block it is a part of its graph
    attend = flex.flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    score_mod = None if scores.cap is None else _score_mod(scores.cap)
    grouped, mask = q.shape[1] != k.shape[1], causal_mask(q.shape[2], str(q.device))
    out: Tensor = attend(q, k, v, score_mod, mask, scale=scores.scale, enable_gqa=grouped, kernel_options=dict(OPTIONS))
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
    # c tanh(x / c). Inductor's tanh branches and takes twice the instructions; docs/gpu.md has what this is off by
    return 2 * cap * torch.sigmoid(score * (2 / cap)) - cap


@lru_cache(maxsize=8)
def _score_mod(cap: float) -> Callable[..., Tensor]:
    return partial(_capped, cap)  # one object per cap: a new one would compile the kernel anew
