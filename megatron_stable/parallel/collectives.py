"""The handful of collectives that tensor parallelism needs, each with its backward.

==============  ==============  ==========
function        forward         backward
==============  ==============  ==========
copy_to         identity        all-reduce
reduce_from     all-reduce      identity
scatter_tokens  reduce-scatter  all-gather
==============  ==============  ==========

The first two are Megatron's f and g (arXiv 1909.08053); the third takes g's place under sequence parallelism (arXiv
2205.05198), where f's is within ``layers.column_linear``.
Without a TP group each is the identity and leaves no trace in the graph.

Under SP the tokens of a micro batch are split in the order in which they lie in memory, sample after sample, and not
each sequence by itself: what acts on tokens one by one does not mind, and gathering and scattering need no copy. A
rank's ``[b, s/tp, ...]`` are so many tokens, and no rows of a sequence::

    [b, s]   0 0 0 0 1 1 1 1 2 2 2 2      tokens by the sequence they belong to, b = 3, s = 4
    tp = 2   rank 0 .... rank 1 ....      each [3, 2]
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


def all_gather_tokens(x: Tensor, tp: TensorParallel) -> Tensor:
    """This rank's tokens ``[b, s/tp, ...]`` -> all of them, ``[b, s, ...]``, without autograd."""
    return start_all_gather_tokens(x, tp)()


def start_all_gather_tokens(x: Tensor, tp: TensorParallel) -> Started:
    """The same, in the background."""
    whole = x.new_empty(x.shape[0], tp.size * x.shape[1], *x.shape[2:])
    work = dist.all_gather_into_tensor(whole.view(-1, *x.shape[1:]), x.contiguous(), group=tp.group, async_op=_apart())
    return partial(_finish, work, lambda: whole)


def reduce_scatter_tokens(x: Tensor, tp: TensorParallel) -> Tensor:
    """Sum ``[b, s, ...]`` over the ranks and keep this rank's tokens ``[b, s/tp, ...]``, without autograd."""
    return start_reduce_scatter_tokens(x, tp)()


def start_reduce_scatter_tokens(x: Tensor, tp: TensorParallel) -> Started:
    """The same, in the background."""
    part = x.new_empty(x.shape[0], x.shape[1] // tp.size, *x.shape[2:])
    whole = x.contiguous().view(-1, *part.shape[1:])
    work = dist.reduce_scatter_tensor(part, whole, group=tp.group, async_op=_apart())
    return partial(_finish, work, lambda: part)


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


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return reduce_scatter_tokens(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather_tokens(grad, ctx.tp), None


def copy_to(x: Tensor, tp: TensorParallel) -> Tensor:
    """Enter a sharded region with a value all ranks share; its gradient is summed over them.

    Used on activations in front of column-parallel layers. Replicated parameters of which each rank sees a part of the
    gradient are not for it: theirs is summed once per step (``parameters.is_partial``).
    """
    return _CopyTo.apply(x, tp) if tp.active else x


def reduce_from(x: Tensor, tp: TensorParallel) -> Tensor:
    """Leave a sharded region: sum the partial results of all ranks."""
    return _ReduceFrom.apply(x, tp) if tp.active else x


def scatter_tokens(x: Tensor, tp: TensorParallel) -> Tensor:
    """Sum ``[b, s, ...]`` over the ranks and keep this rank's tokens ``[b, s/tp, ...]``."""
    return _ScatterTokens.apply(x, tp) if tp.active else x


def leave_region(x: Tensor, tp: TensorParallel) -> Tensor:
    """The end of a row-parallel layer: ``[b, s, h]`` partial sums -> ``[b, s, h]``, under SP ``[b, s/tp, h]``."""
    return scatter_tokens(x, tp) if tp.sequence else reduce_from(x, tp)
