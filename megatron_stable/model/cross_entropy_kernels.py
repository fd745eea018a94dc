"""Triton kernels for the two local steps of the vocab-parallel cross-entropy: one read of the logits forward, one read
and one write backward, in place. ``cross_entropy.py`` has the same steps in PyTorch; ``loss.py`` takes these on CUDA.

In bf16 they move 2 bytes per logit forward and 4 backward, and nothing as large as the logits is allocated; docs/gpu.md
has that beside PyTorch's steps. Arithmetic is fp32. There are no atomics: the same logits give the same bits. Under
``TRITON_INTERPRET=1`` the kernels run on a CPU, slowly: that is how they are tested without a GPU.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from megatron_stable.model.cross_entropy import Columns, Steps
from megatron_stable.model.triton_support import INSTALLED, jit, tl, works

if INSTALLED:
    LOWEST = tl.constexpr(-1.0e30)  # of no columns, or where all are -inf, as inf - inf is not 0

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 4096  # logits that a program holds at a time: 16 for each of the threads of 8 warps, two loads of 16 bytes


@jit
def _tanh(x):  # type: ignore[no-untyped-def]
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0  # libdevice has a tanh, which is slow, and unknown to the interpreter


@jit
def _statistics_of_a_row(  # type: ignore[no-untyped-def]
    logits, targets, statistics, rows, columns, start, valid, cap: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)  # rows x columns passes 2^31: 16k tokens of a vocabulary of 256k are 2^32
    logits += row * columns
    top = tl.full((), LOWEST, tl.float32)
    total = tl.zeros((), tl.float32)
    for first in range(0, valid, block):
        i = first + tl.arange(0, block)
        # the mask is of the columns, which are a multiple of 16, so that loads stay whole; valid may be any number
        y = tl.load(logits + i, mask=i < columns, other=0.0).to(tl.float32)
        if cap is not None:
            y = cap * _tanh(y / cap)
        y = tl.where(i < valid, y, -float("inf"))
        new = tl.maximum(top, tl.max(y, 0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(y - new), 0)
        top = new
    target = tl.load(targets + row) - start
    mine = (target >= 0) & (target < valid)
    y = tl.load(logits + target, mask=mine, other=0.0).to(tl.float32)
    if cap is not None:
        y = cap * _tanh(y / cap)
    tl.store(statistics + row, top)
    tl.store(statistics + rows + row, total)
    tl.store(statistics + 2 * rows + row, tl.where(mine, y, 0.0))


@jit
def _gradient_of_a_block(  # type: ignore[no-untyped-def]
    logits, targets, log_z, of_target, of_all, columns, start, valid, cap: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * block + tl.arange(0, block)
    logits += row * columns
    y = tl.load(logits + i, mask=i < columns, other=0.0).to(tl.float32)
    slope = 1.0
    if cap is not None:
        bent = _tanh(y / cap)
        y = cap * bent
        slope = 1.0 - bent * bent
    target = tl.load(targets + row) - start
    softmax = tl.exp(y - tl.load(log_z + row))
    # before rounding to the logits' dtype: the two terms cancel where the model is sure of itself
    gradient = softmax * tl.load(of_all + row) - tl.where(i == target, tl.load(of_target + row), 0.0)
    gradient = tl.where(i < valid, gradient * slope, 0.0)
    tl.store(logits + i, gradient.to(logits.dtype.element_ty), mask=i < columns)


def _statistics(logits: Tensor, targets: Tensor, columns: Columns) -> Tensor:
    """Of each row of this rank's columns: maximum, sum of exp(logit - maximum), the target's logit or 0.

    Online (arXiv 1805.02867): the sum so far is rescaled when the maximum grows.

    Args:
        logits: ``[n, v/tp]``, contiguous, of one of :data:`DTYPES`.
        targets: ``[n]`` int64, of the whole vocabulary, of any stride.

    Returns:
        ``[3, n]`` in fp32; of a rank without columns that are no padding, (:data:`LOWEST`, 0, 0).
    """
    n, width = logits.shape
    found = logits.new_empty(3, n, dtype=torch.float32)
    with torch.cuda.device_of(logits):
        _statistics_of_a_row[(n,)](logits, targets.contiguous(), found, n, width, *columns, block=BLOCK, num_warps=8)
    return found


def _gradient(
    logits: Tensor, targets: Tensor, log_z: Tensor, of_target: Tensor, of_all: Tensor, columns: Columns
) -> Tensor:
    """softmax x ``of_all`` - onehot(target) x ``of_target``, ``[n, v/tp]``, written over the logits.

    Args:
        logits: As of :func:`_statistics`; afterwards they are their gradient.
        log_z, of_target, of_all: ``[n]`` fp32, of any stride, as the gradient of a mean has none.
    """
    n, width = logits.shape
    rows = (part.contiguous() for part in (targets, log_z, of_target, of_all))
    with torch.cuda.device_of(logits):
        _gradient_of_a_block[(n, -(-width // BLOCK))](logits, *rows, width, *columns, block=BLOCK, num_warps=8)
    return logits


TRITON = Steps(_statistics, _gradient, in_place=True)


@cache
def usable(device: torch.device) -> bool:
    """Whether the kernels run on ``device``, found out by running them on one logit."""

    def run() -> None:
        one, first = torch.zeros(1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        _statistics(one[None], first, Columns(0, 1, None))
        _gradient(one[None].clone(), first, one, one, one, Columns(0, 1, None))

    return works(run, "the loss is computed by PyTorch, slowly and with more memory")
