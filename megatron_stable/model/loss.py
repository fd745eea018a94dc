"""Vocab-parallel cross-entropy with z-loss and final-logit cap, without gathering logits and without an fp32 copy of
them; mu-loss."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from megatron_stable.model.cross_entropy import PYTORCH, Columns, Steps
from megatron_stable.parallel.collectives import reduce_from
from megatron_stable.parallel.topology import TensorParallel


class CrossEntropy(torch.autograd.Function):
    """``[n, v/tp]`` logits, ``[n]`` targets -> (-log p(target) ``[n]``, log Z ``[n]``), both in fp32 or better.

    d logits = softmax * (d nll + d log Z) - onehot(target) * d nll, so that any function of the two, such as the
    z-loss, has its exact gradient. With a cap, this is the gradient of the capped logits, whose slope is 1 - tanh^2.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, tp: TensorParallel, columns: Columns, steps: Steps, overwrite: bool
    ) -> tuple[Tensor, Tensor]:
        top, total, target = _over_ranks(steps.statistics(logits, targets, columns), tp)
        log_z = top + total.log()
        ctx.save_for_backward(logits, targets, log_z)
        ctx.columns, ctx.steps, ctx.overwritten = columns, steps, False
        ctx.overwrite = overwrite and steps.in_place
        return log_z - target, log_z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll: Tensor, grad_log_z: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        if ctx.overwritten:
            raise RuntimeError("the cross-entropy has no second backward: the first wrote the gradient over the logits")
        logits, targets, log_z = ctx.saved_tensors
        if ctx.steps.in_place and not ctx.overwrite:
            logits = logits.clone()
        grad = ctx.steps.gradient(logits, targets, log_z, grad_nll, grad_nll + grad_log_z, ctx.columns)
        if ctx.overwrite:
            ctx.overwritten = True
            increment_version(logits)  # whoever else saved them for backward is told by autograd
        return grad, None, None, None, None, None


def _over_ranks(statistics: Tensor, tp: TensorParallel) -> Tensor:
    """Statistics ``[3, n]`` of each rank's columns -> of all columns."""
    if not tp.active:
        return statistics
    each = statistics.new_empty(tp.size, *statistics.shape)
    dist.all_gather_into_tensor(each.flatten(0, 1), statistics, group=tp.group)
    return combined(each)


def combined(each: Tensor) -> Tensor:
    """``[tp, 3, n]`` -> ``[3, n]``: largest maximum, sum of exponentials relative to it, the target's logit.

    All ranks add the same numbers in the same order, and so have the same bits.
    """
    tops, totals, targets = each.unbind(1)
    top = tops.amax(0)
    return torch.stack([top, (totals * (tops - top).exp()).sum(0), targets.sum(0)])


def _steps_for(logits: Tensor) -> Steps:
    """Triton's kernels on CUDA, where they run; else PyTorch's operators."""
    if logits.is_contiguous() and (logits.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        from megatron_stable.model import cross_entropy_kernels as kernels  # imports Triton, which takes a second

        if logits.dtype in kernels.DTYPES and kernels.usable(logits.device):
            return kernels.TRITON
    return PYTORCH


def vocab_parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    tp: TensorParallel | None = None,
    vocab_size: int | None = None,
    cap: float | None = None,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and log-partition function of logits sharded over the vocabulary.

    Args:
        logits: ``[..., v/tp]``: this rank's columns of the (padded) vocabulary, any floating dtype.
        targets: ``[...]`` int64 in ``[0, vocab_size)``.
        tp: The tensor-parallel group; ``None``: all columns are here.
        vocab_size: Columns from here on are padding and take no part; ``None``: there is no padding.
        cap: Take c x tanh(logit / c) for each logit; ``None``: the logits as they are.
        overwrite: Let backward write the gradient over the logits where kernels compute it, on CUDA. That saves as much
            memory again as the logits take; nobody may read them once it has begun, and there is no second backward.

    Returns:
        ``(nll, log_z)``, both of the targets' shape, in nats, fp32 (fp64 for fp64 logits), alike on all TP ranks.
        Gradients are exact through both.
    """
    tp = tp or TensorParallel()
    columns = logits.shape[-1]
    valid = columns if vocab_size is None else min(columns, max(0, vocab_size - tp.rank * columns))
    flat = logits.flatten(0, -2)
    own = Columns(tp.rank * columns, valid, cap)
    nll, log_z = CrossEntropy.apply(flat, targets.flatten(), tp, own, _steps_for(flat), overwrite)
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
    predicted: Tensor | None = None,
) -> Losses:
    """Mean cross-entropy, ``z_loss`` x mean log(Z)^2 (PaLM, arXiv 2204.02311) over ``[b, s]`` targets, and ``mu`` x
    :func:`mu_loss`, which needs the output embedding's weight. ``see`` is shown the logits and their log Z, to be read
    at once: on CUDA, backward overwrites the logits. Of targets that are not ``predicted`` ``[b, s]`` both are 0, in a
    mean over all: so the gradient is the same function on every layout, however the others are spread over ranks."""
    nll, log_z = vocab_parallel_cross_entropy(logits, targets, tp, vocab_size, cap, overwrite=True)
    if see is not None:
        see(logits, log_z)
    centre = nll.new_zeros(())
    if mu:
        assert output_embedding is not None
        centre = mu * mu_loss(output_embedding, tp, vocab_size)
    if predicted is not None:
        nll, log_z = nll * predicted, log_z * predicted
    return Losses(nll.mean(), z_loss * log_z.square().mean(), centre)
