"""FlexAttention, PyTorch's compiled attention: the kernel that carries a cap where flash-attn is not there."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from megatron_stable.model.scores import Scores

# under a causal mask each query sees one of the first keys that the kernel takes, and blocks of keys follow each other:
# it need not check and look that up
CAUSAL = {"ROWS_GUARANTEED_SAFE": True, "BLOCKS_ARE_CONTIGUOUS": True}
# beside queries of an earlier document those of a later one see none of them: without a check they would become NaN
AMONG_DOCUMENTS: dict[str, bool] = {}
BLOCK = 128  # queries or keys, as the kernel takes them


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, dropout: float, documents: Any | None = None
) -> Tensor:
    """A fused kernel that carries the cap; CUDA only (it has no backward on the CPU), no dropout.

    ``documents``: what :func:`document_blocks` returns; ``None``: each row is one.
    """
    from torch.nn.attention import flex_attention as flex

    assert not dropout and scores.clip is None
    # within a compiled block it is a part of its graph
    attend = flex.flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    score_mod = None if scores.cap is None else _score_mod(scores.cap)
    grouped = q.shape[1] != k.shape[1]
    mask = causal_mask(q.shape[2], str(q.device)) if documents is None else documents
    options = dict(CAUSAL if documents is None else AMONG_DOCUMENTS)
    out: Tensor = attend(q, k, v, score_mod, mask, scale=scores.scale, enable_gqa=grouped, kernel_options=options)
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


def document_blocks(starts: Tensor, device: torch.device) -> Any:
    """FlexAttention's mask of queries that see the keys from their documents' starts ``[b, s]`` to their own.

    As starts never fall along a row, the first and the last query of a block say which blocks of keys it sees in part
    and which whole: nothing of s x s is made.
    """
    from torch.nn.attention import flex_attention as flex

    starts, length = starts.to(device, non_blocking=True), starts.shape[1]
    first = starts[:, ::BLOCK, None]  # [b, blocks, 1]
    last = starts[:, torch.arange(BLOCK - 1, length + BLOCK - 1, BLOCK, device=device).clamp_(max=length - 1), None]
    key = torch.arange(first.shape[1], device=device)
    query = key[:, None]
    whole = (key < query) & (key * BLOCK >= last)
    some = (key <= query) & (key >= first // BLOCK) & ~whole

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """``[b, blocks, blocks]`` -> how many each block of queries sees, and which, these first."""
        blocks = blocks.unsqueeze(1).int()
        return blocks.sum(-1, dtype=torch.int32), blocks.argsort(dim=-1, descending=True, stable=True).int()

    def within(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (key >= starts[b, query])

    return flex.BlockMask.from_kv_blocks(
        *listed(some), *listed(whole), BLOCK_SIZE=BLOCK, mask_mod=within, seq_lengths=(length, length)
    )


def _capped(cap: float, score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    # c tanh(x / c). Inductor's tanh branches and takes twice the instructions; docs/gpu.md has what this is off by
    return 2 * cap * torch.sigmoid(score * (2 / cap)) - cap


@lru_cache(maxsize=8)
def _score_mod(cap: float) -> Callable[..., Tensor]:
    return partial(_capped, cap)  # one object per cap: a new one would compile the kernel anew
