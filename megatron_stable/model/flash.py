"""The packages of FlashAttention, where one is there: attention with the cap in the kernel.

FlashAttention-3 (arXiv 2407.08608) is for Hopper and built from source as ``flash_attn_interface``; FlashAttention-2
(arXiv 2307.08691) is PyPI's flash-attn. ``model.attention=auto`` takes what is there for caps, once per process, on all
ranks or none, and only after it has computed, on the device, what ``math`` computes.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from megatron_stable.apex import Found
from megatron_stable.config.schema import ModelConfig
from megatron_stable.model.scores import Scores, math_attention, visible

VERSIONS = {"flash_attn_interface": "FlashAttention-3", "flash_attn": "FlashAttention-2"}
INSTALL = "pip install flash-attn, or on Hopper build FlashAttention-3 (hopper/ of Dao-AILab/flash-attention)"

APART = 2**-5  # of itself: a fast tanh and roundings to bf16 make less, a missing cap or a wrong mask more

_taken = False
_KERNELS: dict[tuple[bool, bool], Callable[..., Any]] = {}


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, dropout: float, ends: Tensor | None = None
) -> Tensor:
    """CUDA, bf16 and fp16; it carries the cap, though not with dropout. Its tanh is good to 2^-11 of a logit.

    ``ends``: what :func:`document_ends` returns; ``None``: each row is a document.
    """
    assert scores.clip is None
    (b, _, s, _), (q, k, v) = q.shape, (x.transpose(1, 2) for x in (q, k, v))
    among: dict[str, Any] = {}
    if ends is not None:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        among = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": s, "max_seqlen_k": s}
    out = kernel(dropout > 0, ends is not None)(
        q,
        k,
        v,
        **among,
        **({"dropout_p": dropout} if dropout else {}),
        softmax_scale=scores.scale,
        causal=True,
        softcap=scores.cap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    first: Tensor = out[0] if isinstance(out, tuple) else out  # FlashAttention-3 used to return the log of sums, too
    return first.view(b, s, *first.shape[-2:]).transpose(1, 2)


def document_ends(starts: Tensor, device: torch.device) -> Tensor:
    """Where documents end in the rows of a micro batch, one behind the other, int32, from 0 on.

    Args:
        starts: ``[b, s]``: where in its row the document of each token begins. On the CPU, nothing waits for a device.

    Their number is rounded up to a power of two by empty ones, so that few lengths meet a compiled block.
    """
    begin = (starts == torch.arange(starts.shape[1], device=starts.device)).flatten().nonzero().flatten()
    ends = begin.new_full((1 << len(begin).bit_length(),), starts.numel())
    ends[: len(begin)] = begin
    return ends.int().to(device, non_blocking=True)


def module(dropout: bool) -> str | None:
    """The module to take on this GPU; ``None``: none is installed that computes it."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    fitting = [name for name in VERSIONS if name == "flash_attn" or (hopper and not dropout)]
    return next((name for name in fitting if find_spec(name) is not None), None)


def kernel(dropout: bool, documents: bool = False) -> Callable[..., Any]:
    """Its function, imported once; a compiled block has to find it there."""
    if (dropout, documents) not in _KERNELS:
        name = module(dropout)
        assert name is not None
        found = import_module(name)
        _KERNELS[dropout, documents] = found.flash_attn_varlen_func if documents else found.flash_attn_func
    return _KERNELS[dropout, documents]


def try_out(model: ModelConfig, dtype: torch.dtype, device: torch.device, documents: bool = False) -> Found:
    """Compare what is installed with ``math``, forward and backward, for the heads and the cap of ``model``;
    where blocks may be compiled, as one graph, too; with documents in the rows, if the run has some."""
    name = module(dropout=False)  # with it, a cap is not for flash-attn
    if name is None:
        return Found(False, f"flash-attn, which would be faster, is not installed: {INSTALL}", absent=True)
    said, width, ratio = VERSIONS[name], model.head_dim, model.heads // model.groups
    scores, generator = Scores(width**-0.5, model.attention_cap), torch.Generator(device).manual_seed(0)

    def draw(heads: int, scale: int) -> Tensor:
        return scale * torch.randn(2, 256, heads, width, device=device, generator=generator).transpose(1, 2)

    # logits of 16, which a cap bends
    tensors = draw(2 * ratio, 4), draw(2, 4), draw(2, 1), draw(2 * ratio, 1)
    results = []
    starts = torch.tensor([[0] * 256, [0] * 100 + [100] * 156])
    plain, fused = ([visible(starts, device)], [document_ends(starts, device)]) if documents else ([], [])
    try:
        kernel(False, documents)
        compiled = [torch.compile(flash_attention, backend="aot_eager", fullgraph=True)] if model.compile else []
        for attend in (math_attention, flash_attention, *compiled):
            q, k, v, upstream = (x.to(dtype).requires_grad_() for x in tensors)
            out = attend(q, k, v, scores, 0.0, *(plain if attend is math_attention else fused))
            results.append([out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)])
        wanted, *found = results
        pairs = [pair for each in found for pair in zip(each, wanted, strict=True)]
        same = all((a - b).float().norm() <= APART * b.float().norm() for a, b in pairs)  # nor is a NaN close
    except Exception as error:  # built for another torch or another GPU: whatever it raises
        why = next(iter(str(error).strip().splitlines()), "")
        return Found(False, f"{said} does not work here ({type(error).__name__}: {why})")
    return Found(same, said if same else f"{said} computes attention otherwise than PyTorch here")


def take(use: bool) -> None:
    """Whether ``auto`` takes it for caps in this process from now on; :func:`try_out` has to have found it usable."""
    global _taken
    _taken = use


def taken() -> bool:
    """Whether ``auto`` takes it."""
    return _taken
