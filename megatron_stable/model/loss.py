"""Vocab-parallel cross-entropy and z-loss, without gathering logits and without an fp32 copy of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_stable.parallel.topology import TensorParallel

CHUNK = 2**24  # logits in fp32 at a time


def _chunks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK // max(1, logits.shape[1]))
    return (slice(start, start + rows) for start in range(0, logits.shape[0], rows))


class _CrossEntropy(torch.autograd.Function):
    """``[n, v/tp]`` logits, ``[n]`` targets -> (-log p(target) ``[n]``, log Z ``[n]``), both in fp32 or better.

    d logits = softmax * (d nll + d log Z) - onehot(target) * d nll, so that any function of the two, such as the
    z-loss, has its exact gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, tp: TensorParallel, valid: int) -> tuple[Tensor, Tensor]:
        n, columns = logits.shape
        wide = torch.promote_types(logits.dtype, torch.float32)
        local = targets - tp.rank * columns
        mine = (local >= 0) & (local < columns)
        local = local.masked_fill(~mine, 0)
        top = logits[:, :valid].amax(1).to(wide) if valid else logits.new_full((n,), -torch.inf, dtype=wide)
        if tp.active:
            dist.all_reduce(top, dist.ReduceOp.MAX, group=tp.group)
        sums = logits.new_empty(2, n, dtype=wide)  # sum of exponentials; logit of the target
        for rows in _chunks(logits):
            sums[0, rows] = (logits[rows, :valid].to(wide) - top[rows, None]).exp_().sum(1)
        sums[1] = logits.gather(1, local[:, None])[:, 0].to(wide).masked_fill(~mine, 0)
        if tp.active:
            dist.all_reduce(sums, group=tp.group)
        log_z = sums[0].log() + top
        ctx.save_for_backward(logits, log_z, local, mine)
        ctx.valid = valid
        return log_z - sums[1], log_z

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor, grad_log_z: Tensor) -> tuple[Tensor, None, None, None]:
        logits, log_z, local, mine = ctx.saved_tensors
        grad = torch.empty_like(logits)
        both = (grad_nll + grad_log_z)[:, None]
        target = grad_nll.masked_fill(~mine, 0)[:, None]
        for rows in _chunks(logits):
            part = (logits[rows].to(log_z.dtype) - log_z[rows, None]).exp_().mul_(both[rows])
            part[:, ctx.valid :] = 0
            # before rounding to the logits' dtype: the two terms cancel where the model is sure of itself
            grad[rows] = part.scatter_add_(1, local[rows, None], -target[rows])
        return grad, None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, tp: TensorParallel | None = None, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and log-partition function of logits sharded over the vocabulary.

    Args:
        logits: ``[..., v/tp]``: this rank's columns of the (padded) vocabulary, any floating dtype.
        targets: ``[...]`` int64 in ``[0, vocab_size)``.
        tp: The tensor-parallel group; ``None``: all columns are here.
        vocab_size: Columns from here on are padding and take no part; ``None``: there is no padding.

    Returns:
        ``(nll, log_z)``, both of the targets' shape, in nats, fp32 (fp64 for fp64 logits), alike on all TP ranks.
        Gradients are exact through both.
    """
    tp = tp or TensorParallel()
    columns = logits.shape[-1]
    valid = columns if vocab_size is None else min(columns, max(0, vocab_size - tp.rank * columns))
    nll, log_z = _CrossEntropy.apply(logits.flatten(0, -2), targets.flatten(), tp, valid)
    return nll.view_as(targets), log_z.view_as(targets)


class Losses(NamedTuple):
    """The parts of the loss of a micro batch, scalars in nats per token."""

    cross_entropy: Tensor
    z_loss: Tensor  # coefficient included


def language_model_loss(logits: Tensor, targets: Tensor, tp: TensorParallel, vocab_size: int, z_loss: float) -> Losses:
    """Mean cross-entropy and ``z_loss`` x mean log(Z)^2 (PaLM, arXiv 2204.02311) over ``[b, s]`` targets."""
    nll, log_z = vocab_parallel_cross_entropy(logits, targets, tp, vocab_size)
    return Losses(nll.mean(), z_loss * log_z.square().mean())
