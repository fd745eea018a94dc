"""How attention is computed: backends that give the same numbers, and which of them a recipe and a device allow."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention import sdpa_kernel as restrict

from megatron_stable.config.attention import limits
from megatron_stable.config.schema import ModelConfig
from megatron_stable.errors import ConfigError
from megatron_stable.model import flash
from megatron_stable.model.flex import document_blocks, flex_attention
from megatron_stable.model.scores import Scores, math_attention, visible

# q, k, v: [b, heads, s, d] (k and v may have fewer heads), scores, dropout, with documents in the rows what SEEN makes
# of them -> [b, heads, s, d]
Backend = Callable[..., Tensor]


NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, dropout: float, visible: Tensor | None = None
) -> Tensor:
    """PyTorch's fused attention; it has no cap and no clip. ``visible``: as :func:`math_attention` has it."""
    assert scores.cap is None and scores.clip is None
    grouped = q.shape[1] != k.shape[1]
    causal = visible is None and q.shape[2] > 1  # it takes the first query to be the first key's
    # with a mask, cuDNN 9.20 gives gradients that are NaN (pytorch#196678)
    usable = restrict(NOT_CUDNN) if visible is not None and q.is_cuda else nullcontext()
    with usable:
        return F.scaled_dot_product_attention(
            q, k, v, visible, dropout_p=dropout, is_causal=causal, scale=scores.scale, enable_gqa=grouped
        )


BACKENDS: dict[str, Backend] = {
    "math": math_attention,
    "sdpa": sdpa_attention,
    "flex": flex_attention,
    "flash": flash.flash_attention,
}
# of where documents begin, [b, s]: what a backend takes to keep queries within theirs, on a device
SEEN: dict[str, Callable[[Tensor, torch.device], Any]] = {
    "math": visible,
    "sdpa": visible,
    "flex": document_blocks,
    "flash": flash.document_ends,
}
FASTEST = ("sdpa", "flex")  # that come with PyTorch, the faster first
FASTEST_AMONG_DOCUMENTS = ("flex", "sdpa")  # which takes their mask as a matrix, and leaves its fastest kernels for it
NEEDS_CUDA = {"flex": "it has no backward on a CPU", "flash": "flash-attn is made for it"}


class Choice(NamedTuple):
    """A backend, and why it was taken."""

    name: str
    reason: str


def choose_backend(config: ModelConfig, device: str, documents: bool = False) -> Choice:
    """The fastest backend that computes ``config`` exactly on ``device`` ("cpu", "cuda"), or the one it names.

    Args:
        documents: Whether attention stays within documents, of which rows hold several.

    Raises:
        ConfigError: The one it names does not run here.
    """
    if config.attention != "auto":
        _refuse_absent(config, device)
        return Choice(config.attention, "the configuration names it")
    suits = config.attention_cap is not None or documents
    if flash.taken() and device == "cuda" and suits and not any(limits("flash", config)):
        what = "within documents" if documents else "with a cap"
        return Choice("flash", f"it is installed, agrees with PyTorch's operators here, and is the fastest {what}")
    reasons = []
    for name in FASTEST_AMONG_DOCUMENTS if documents else FASTEST:
        wrong = [f"cannot compute {limit}" for limit in limits(name, config)]
        if name in NEEDS_CUDA and device != "cuda":
            wrong.append(f"needs a CUDA GPU, as {NEEDS_CUDA[name]}")
        if not wrong:
            return Choice(name, "it is the fastest that computes all of the recipe here")
        reasons.append(f"{name} {' and '.join(wrong)}")
    return Choice("math", "; ".join(reasons))


def _refuse_absent(config: ModelConfig, device: str) -> None:
    name = config.attention
    if name in NEEDS_CUDA and device != "cuda":
        raise ConfigError(f"model.attention {name} needs a CUDA GPU, as {NEEDS_CUDA[name]}: set model.attention=auto")
    if name == "flash" and flash.module(config.attention_dropout > 0) is None:
        raise ConfigError(
            "model.attention flash needs the package flash-attn, which is not installed: "
            f"install it ({flash.INSTALL}), or set model.attention=auto"
        )


def sdpa_kernel(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> str:
    """Which of its kernels SDPA takes for such heads in training, as PyTorch says ("cudnn_attention", ...).

    The choice is PyTorch's: on Hopper cuDNN's, if cuDNN is newer than 9.15.0 and the run need not be deterministic.
    """
    q, k = (torch.empty(1, n, 128, model.head_dim, dtype=dtype, device=device) for n in (model.heads, model.groups))
    q, k = q.requires_grad_(), k.requires_grad_()
    grouped = model.heads != model.groups
    chosen = torch._fused_sdp_choice(q, k, k, None, model.attention_dropout, True, enable_gqa=grouped)
    return str(SDPBackend(chosen).name.lower())
