"""The largest attention logit of each head, before any cap, which QK-Clip (arXiv 2507.20534) asks for.

No backend tells: SDPA and flash-attn keep it in registers, FlexAttention has it after the cap. So it is found by a pass
of its own over queries and keys: on CUDA a Triton kernel that does the first of attention's two products and writes one
number per block of queries, elsewhere PyTorch's operators on some queries at a time. docs/gpu.md counts both.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from megatron_stable.model.triton_support import jit, tl, works

DTYPES = (torch.bfloat16, torch.float16)  # fp32 without TF32 is no work for tensor cores, and spills registers
WARPS, STAGES = 8, 2


def max_attention_logits(q: Tensor, k: Tensor, scale: float, starts: Tensor | None = None) -> Tensor:
    """The largest attention logit of each head, before any cap, over the keys that each query may see.

    In a compiled block it is a part of the graph. A NaN among the logits may count as none: the loss shows it.

    Args:
        q: ``[b, heads, s, d]``.
        k: ``[b, heads, s, d]``, or fewer heads, each for several of ``q``'s.
        scale: Factor of q k, positive.
        starts: ``[b, s]``: the first key that each query sees, never falling along a row; ``None``: the row's.

    Returns:
        ``[heads]``, fp32 (fp64 for fp64 inputs), without gradient.
    """
    top: Tensor = _largest_products(q.detach(), k.detach(), starts)
    return top * scale


@torch.library.custom_op("megatron_stable::largest_products", mutates_args=())
def _largest_products(q: Tensor, k: Tensor, starts: Tensor | None = None) -> Tensor:
    kernel = q.is_cuda and usable(q.device, q.dtype, q.shape[-1])
    return by_kernel(q, k, starts) if kernel else by_chunks(q, k, starts=starts)


@_largest_products.register_fake
def _(q: Tensor, k: Tensor, starts: Tensor | None = None) -> Tensor:
    return q.new_empty(q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32))


def by_chunks(q: Tensor, k: Tensor, chunk: int = 128, starts: Tensor | None = None) -> Tensor:
    """The largest q k of each head, with those of ``chunk`` queries in memory at a time, not s x s.

    Products of bf16 are rounded to bf16, which is enough to compare with a threshold; those of fp16 are fp32, as they
    may not fit.
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
        hidden = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device).triu(1 + start)
        if starts is not None:
            earlier = torch.arange(stop, device=q.device) < starts[:, start:stop, None]
            hidden = (hidden | earlier).unsqueeze(1)
        top = torch.maximum(top, products.masked_fill(hidden, -torch.inf).amax((0, 2, 3)).to(wide))
    return top


@jit
def _largest_of_a_block(  # type: ignore[no-untyped-def]
    q, k, starts, tops, length, heads, group,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    unit: tl.constexpr, width: tl.constexpr, columns: tl.constexpr, block: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head, with all keys that they may see. Strides are in units of so many elements."""
    blocks = tl.cdiv(length, block)
    sequence = tl.program_id(0) // blocks
    first = (blocks - 1 - tl.program_id(0) % blocks) * block  # the last queries see the most keys, and so begin first
    batch, head = (sequence // heads).to(tl.int64), (sequence % heads).to(tl.int64)
    rows, column = tl.arange(0, block), tl.arange(0, columns)
    inside, present = (column < width)[None, :], first + rows < length
    q += (batch * q_batch + head * q_head + first.to(tl.int64) * q_row) * unit
    k += (batch * k_batch + (head // group) * k_head) * unit
    k_block = k + rows[:, None] * k_row * unit + column[None, :]
    queries = tl.load(q + rows[:, None] * q_row * unit + column[None, :], mask=present[:, None] & inside, other=0.0)
    top = tl.full((block, block), -float("inf"), tl.float32)
    begin = 0
    if documents:
        starts += batch * length + first
        begin = tl.load(starts) // block * block  # of the first query, which sees the farthest back
        k_block += begin.to(tl.int64) * k_row * unit
        starting = tl.load(starts + rows, mask=present, other=0)
    for at in range(begin, first, block):
        keys = tl.load(k_block, mask=inside, other=0.0)
        # fp32 in full, where tensor cores would take TF32
        products = tl.dot(queries, tl.trans(keys))
        if documents:
            products = tl.where(at + rows[None, :] >= starting[:, None], products, -float("inf"))
        top = tl.maximum(top, products)
        k_block += block * k_row * unit
    keys = tl.load(k_block, mask=present[:, None] & inside, other=0.0)
    products = tl.dot(queries, tl.trans(keys))
    seen = rows[:, None] >= rows[None, :]
    if documents:
        seen &= first + rows[None, :] >= starting[:, None]
    top = tl.maximum(top, tl.where(seen, products, -float("inf")))
    top = tl.where(present[:, None], top, -float("inf"))
    tl.store(tops + tl.program_id(0), tl.max(tl.max(top, 1), 0))


def tile(dtype: torch.dtype, width: int) -> tuple[int, int]:
    """(columns, block): the width of heads as a power of two, and queries or keys of a block, so that three blocks,
    one of queries and two of keys, fit into the shared memory of a multiprocessor."""
    columns = max(16, 1 << (width - 1).bit_length())
    return columns, 128 if columns * dtype.itemsize <= 256 else 64


def by_kernel(q: Tensor, k: Tensor, starts: Tensor | None = None) -> Tensor:
    """The same on a GPU; products are fp32, whatever the dtype. No atomics: the same inputs give the same bits."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    (b, heads, length, width), (columns, block) = q.shape, tile(q.dtype, q.shape[-1])
    blocks = -(-length // block)
    strides = (*q.stride()[:3], *k.stride()[:3])
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1  # 16 bytes, which are then loaded at a time
    tops = q.new_empty(b, heads, blocks, dtype=torch.float32)
    with torch.cuda.device_of(q):
        _largest_of_a_block[(b * heads * blocks,)](
            q, k, tops if starts is None else starts, tops,
            length, heads, heads // k.shape[1], *(stride // unit for stride in strides),
            unit=unit, width=width, columns=columns, block=block, documents=starts is not None,
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return tops.amax((0, 2))


@cache
def usable(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the kernel runs on ``device`` for heads of such a width, found out by running it on one query."""

    def run() -> None:
        one = torch.ones(1, 1, 1, width, dtype=dtype, device=device)
        by_kernel(one, one)

    return dtype in DTYPES and works(run, "the largest attention logits are computed by PyTorch, slowly")
