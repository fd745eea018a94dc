"""Vocab-parallel cross-entropy with z-loss and final-logit cap, without gathering logits and without an fp32 copy of
them; mu-loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_stable.model.elementwise import soft_cap
from megatron_stable.parallel.collectives import reduce_from
from megatron_stable.parallel.topology import TensorParallel

CHUNK = 2**24  # logits in fp32 at a time


def _chunks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK // max(1, logits.shape[1]))
    return (slice(start, start + rows) for start in range(0, logits.shape[0], rows))


class _CrossEntropy(torch.autograd.Function):
    """``[n, v/tp]`` logits, ``[n]`` targets -> (-log p(target) ``[n]``, log Z ``[n]``), both in fp32 or better.

    d logits = softmax * (d nll + d log Z) - onehot(target) * d nll, so that any function of the two, such as the
    z-loss, has its exact gradient. With a cap, this is the gradient of the capped logits, whose slope is 1 - tanh^2.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, tp: TensorParallel, valid: int, cap: float | None
    ) -> tuple[Tensor, Tensor]:
        n, columns = logits.shape
        wide = torch.promote_types(logits.dtype, torch.float32)
        local = targets - tp.rank * columns
        mine = (local >= 0) & (local < columns)
        local = local.masked_fill(~mine, 0)
        top = logits[:, :valid].amax(1).to(wide) if valid else logits.new_full((n,), -torch.inf, dtype=wide)
        if tp.active:
            dist.all_reduce(top, dist.ReduceOp.MAX, group=tp.group)
        top = _capped(top, cap)
        sums = logits.new_empty(2, n, dtype=wide)  # sum of exponentials; logit of the target
        for rows in _chunks(logits):
            sums[0, rows] = (_capped(logits[rows, :valid].to(wide), cap) - top[rows, None]).exp_().sum(1)
        sums[1] = _capped(logits.gather(1, local[:, None])[:, 0].to(wide), cap).masked_fill(~mine, 0)
        if tp.active:
            dist.all_reduce(sums, group=tp.group)
        log_z = sums[0].log() + top
        ctx.save_for_backward(logits, log_z, local, mine)
        ctx.valid, ctx.cap = valid, cap
        return log_z - sums[1], log_z

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor, grad_log_z: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, log_z, local, mine = ctx.saved_tensors
        grad = torch.empty_like(logits)
        both = (grad_nll + grad_log_z)[:, None]
        target = grad_nll.masked_fill(~mine, 0)[:, None]
        for rows in _chunks(logits):
            capped = _capped(logits[rows].to(log_z.dtype), ctx.cap)
            part = (capped - log_z[rows, None]).exp_().mul_(both[rows])
            part[:, ctx.valid :] = 0
            # before rounding to the logits' dtype: the two terms cancel where the model is sure of itself
            part.scatter_add_(1, local[rows, None], -target[rows])
            grad[rows] = part if ctx.cap is None else part.mul_(1 - (capped / ctx.cap).square_())
        return grad, None, None, None, None


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else soft_cap(logits, cap)


def vocab_parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    tp: TensorParallel | None = None,
    vocab_size: int | None = None,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and log-partition function of logits sharded over the vocabulary.

    Args:
        logits: ``[..., v/tp]``: this rank's columns of the (padded) vocabulary, any floating dtype.
        targets: ``[...]`` int64 in ``[0, vocab_size)``.
        tp: The tensor-parallel group; ``None``: all columns are here.
        vocab_size: Columns from here on are padding and take no part; ``None``: there is no padding.
        cap: Take c x tanh(logit / c) for each logit; ``None``: the logits as they are.

    Returns:
        ``(nll, log_z)``, both of the targets' shape, in nats, fp32 (fp64 for fp64 logits), alike on all TP ranks.
        Gradients are exact through both.
    """
    tp = tp or TensorParallel()
    columns = logits.shape[-1]
    valid = columns if vocab_size is None else min(columns, max(0, vocab_size - tp.rank * columns))
    nll, log_z = _CrossEntropy.apply(logits.flatten(0, -2), targets.flatten(), tp, valid, cap)
    return nll.view_as(targets), log_z.view_as(targets)


def mu_loss(weight: Tensor, tp: TensorParallel, vocab_size: int) -> Tensor:
    """Squared norm of the output embedding's mean over the vocabulary (arXiv 2601.02031), without coefficient.

    A common part of all rows shifts all logits of a position alike, so the softmax does not see it.

    Args:
        weight: ``[v/tp, h]``: this rank's rows of the (padded) vocabulary.
        vocab_size: Rows from here on are padding and take no part.
    """
    valid = min(len(weight), max(0, vocab_size - tp.rank * len(weight)))
    total = weight[:valid].sum(0, dtype=torch.promote_types(weight.dtype, torch.float32))
    return (reduce_from(total, tp) / vocab_size).square().sum()


class Losses(NamedTuple):
    """The parts of the loss of a micro batch, scalars in nats per token, coefficients included."""

    cross_entropy: Tensor
    z_loss: Tensor
    mu_loss: Tensor


def language_model_loss(
    logits: Tensor,
    targets: Tensor,
    tp: TensorParallel,
    vocab_size: int,
    z_loss: float,
    cap: float | None = None,
    mu: float = 0.0,
    output_embedding: Tensor | None = None,
    see: Callable[[Tensor, Tensor], None] | None = None,
) -> Losses:
    """Mean cross-entropy, ``z_loss`` x mean log(Z)^2 (PaLM, arXiv 2204.02311) over ``[b, s]`` targets, and ``mu`` x
    :func:`mu_loss`, which needs the output embedding's weight. ``see`` is shown the logits and their log Z."""
    nll, log_z = vocab_parallel_cross_entropy(logits, targets, tp, vocab_size, cap)
    if see is not None:
        see(logits, log_z)
    centre = nll.new_zeros(())
    if mu:
        assert output_embedding is not None
        centre = mu * mu_loss(output_embedding, tp, vocab_size)
    return Losses(nll.mean(), z_loss * log_z.square().mean(), centre)
