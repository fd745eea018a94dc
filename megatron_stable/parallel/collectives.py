"""The handful of collectives that tensor parallelism needs, each with its backward.

================  =====================  =====================
function          forward                backward
================  =====================  =====================
copy_to           identity               all-reduce
reduce_from       all-reduce             identity
scatter_sequence  reduce-scatter over s  all-gather over s
================  =====================  =====================

The first two are Megatron's f and g (arXiv 1909.08053); the third takes g's place under sequence parallelism (arXiv
2205.05198), where f's is within ``layers.column_linear``.
Without a TP group each is the identity and leaves no trace in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_stable.parallel.topology import TensorParallel

Started = Callable[[], Tensor]  # waits for a collective that has begun, and gives what came of it


def all_gather_sequence(x: Tensor, tp: TensorParallel) -> Tensor:
    """``[b, s/tp, ...]`` on each rank -> ``[b, s, ...]``, without autograd."""
    return start_all_gather_sequence(x, tp)()


def start_all_gather_sequence(x: Tensor, tp: TensorParallel) -> Started:
    """The same, in the background."""
    parts = x.new_empty(tp.size, *x.shape)
    work = dist.all_gather_into_tensor(parts.flatten(0, 1), x.contiguous(), group=tp.group, async_op=_apart())
    # [b, tp, s/tp, ...]: a view when b == 1
    return partial(_finish, work, lambda: parts.transpose(0, 1).flatten(1, 2))


def reduce_scatter_sequence(x: Tensor, tp: TensorParallel) -> Tensor:
    """Sum ``[b, s, ...]`` over the ranks and keep this rank's ``[b, s/tp, ...]``, without autograd."""
    return start_reduce_scatter_sequence(x, tp)()


def start_reduce_scatter_sequence(x: Tensor, tp: TensorParallel) -> Started:
    """The same, in the background."""
    parts = x.unflatten(1, (tp.size, -1)).transpose(0, 1).contiguous()  # [tp, b, s/tp, ...]
    out = torch.empty_like(parts[0])
    work = dist.reduce_scatter_tensor(out, parts.flatten(0, 1), group=tp.group, async_op=_apart())
    return partial(_finish, work, lambda: out)


def start_all_reduce(x: Tensor, tp: TensorParallel) -> Started:
    """Sum over the ranks, in the background; in place, where ``x`` is contiguous."""
    x = x.contiguous()
    work = dist.all_reduce(x, group=tp.group, async_op=_apart())
    return partial(_finish, work, lambda: x)


def _apart() -> bool:
    """Whether a collective runs beside what comes after it. A compiled block leaves that to the compiler, for which a
    handle to wait for would be the end of a graph."""
    return not torch.compiler.is_compiling()


def _finish(work: dist.Work | None, result: Callable[[], Tensor]) -> Tensor:
    if work is not None:
        work.wait()
    return result()


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.tp.group)
        return grad, None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=tp.group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return reduce_scatter_sequence(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather_sequence(grad, ctx.tp), None


def copy_to(x: Tensor, tp: TensorParallel) -> Tensor:
    """Enter a sharded region with a value all ranks share; its gradient is summed over them.

    Used on activations in front of column-parallel layers. Replicated parameters of which each rank sees a part of the
    gradient are not for it: theirs is summed once per step (``parameters.is_partial``).
    """
    return _CopyTo.apply(x, tp) if tp.active else x


def reduce_from(x: Tensor, tp: TensorParallel) -> Tensor:
    """Leave a sharded region: sum the partial results of all ranks."""
    return _ReduceFrom.apply(x, tp) if tp.active else x


def scatter_sequence(x: Tensor, tp: TensorParallel) -> Tensor:
    """Sum ``[b, s, ...]`` over the ranks and keep this rank's ``[b, s/tp, ...]``."""
    return _ScatterSequence.apply(x, tp) if tp.active else x


def leave_region(x: Tensor, tp: TensorParallel) -> Tensor:
    """The end of a row-parallel layer: ``[b, s, h]`` partial sums -> ``[b, s, h]``, under SP ``[b, s/tp, h]``."""
    return scatter_sequence(x, tp) if tp.sequence else reduce_from(x, tp)
