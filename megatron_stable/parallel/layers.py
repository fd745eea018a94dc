"""Column-, row- and vocab-parallel layers (arXiv 1909.08053), with sequence parallelism (arXiv 2205.05198).

The math above them does not know that weights are sharded: a column-parallel layer takes ``[b, s, h]`` (under SP
``[b, s/tp, h]``) and returns features/tp; a row-parallel layer takes features/tp and returns what the first took.
If somebody puts a module there, what these two take is ``reparametrize(x, weight)``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_stable.parallel.collectives import (
    all_gather_tokens,
    leave_region,
    start_all_gather_tokens,
    start_all_reduce,
    start_reduce_scatter_tokens,
)
from megatron_stable.parallel.parameters import parameter
from megatron_stable.parallel.shards import ZEROS, Init
from megatron_stable.parallel.topology import TensorParallel


class _ColumnLinear(torch.autograd.Function):
    """``gather(x) @ weight.T``. In backward no collective is waited for before there is nothing left to compute.

    Under SP only the shard ``[b, s/tp, h]`` of the input is kept for backward and gathered again there, while the
    input's gradient is computed; that is reduced while the weight's is.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, tp: TensorParallel) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tp = tp
        return F.linear(all_gather_tokens(x, tp) if tp.sequence else x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        tp: TensorParallel = ctx.tp
        gathering = start_all_gather_tokens(x, tp) if tp.sequence else None
        grad_x = grad @ weight
        reducing = start_reduce_scatter_tokens(grad_x, tp) if tp.sequence else start_all_reduce(grad_x, tp)
        if gathering is not None:
            x = gathering()
        grad_weight = grad.flatten(0, -2).T @ x.flatten(0, -2)
        return reducing(), grad_weight, None


def column_linear(x: Tensor, weight: Tensor, tp: TensorParallel) -> Tensor:
    """``[b, s, in]`` (under SP ``[b, s/tp, in]``) times ``weight [out/tp, in]`` -> ``[b, s, out/tp]``."""
    return _ColumnLinear.apply(x, weight, tp) if tp.active else F.linear(x, weight)


class ColumnParallelLinear(nn.Module):
    """A linear layer whose outputs are sharded over TP.

    Args:
        inputs: Input features.
        outputs: Output features at full size; a tuple ``(parts, features)`` makes ``parts`` outputs that are each
            sharded alike (gate and up projection of SwiGLU).
        init: How the weight is drawn.
        bias: Whether there is a bias, drawn as zeros.
    """

    def __init__(
        self, inputs: int, outputs: int | tuple[int, int], init: Init, tp: TensorParallel, bias: bool = False
    ) -> None:
        super().__init__()
        self.tp = tp
        shape = outputs if isinstance(outputs, tuple) else (outputs,)
        dim = len(shape) - 1
        self.weight = parameter((*shape, inputs), init, tp, dim)
        self.reparametrize: nn.Module | None = None
        self.bias = parameter(shape, ZEROS, tp, dim) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``[b, s, in]``, under SP ``[b, s/tp, in]`` -> ``[b, s, out/tp]``; parts follow one another."""
        y = column_linear(_entering(x, self), self.weight.flatten(0, -2), self.tp)
        return y if self.bias is None else y + self.bias.flatten()


def _entering(x: Tensor, linear: ColumnParallelLinear | RowParallelLinear) -> Tensor:
    return x if linear.reparametrize is None else linear.reparametrize(x, linear.weight)


class RowParallelLinear(nn.Module):
    """A linear layer whose inputs are sharded over TP."""

    def __init__(self, inputs: int, outputs: int, init: Init, tp: TensorParallel, bias: bool = False) -> None:
        super().__init__()
        self.tp = tp
        self.weight = parameter((outputs, inputs), init, tp, 1)
        self.reparametrize: nn.Module | None = None
        self.bias = parameter((outputs,), ZEROS, partial=tp.sequence_sharded) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``[b, s, in/tp]`` -> ``[b, s, out]``, under SP ``[b, s/tp, out]``."""
        y = leave_region(F.linear(_entering(x, self), self.weight), self.tp)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """A token embedding whose rows are sharded over TP."""

    def __init__(self, vocabulary: int, hidden: int, init: Init, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.weight = parameter((vocabulary, hidden), init, tp, 0)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[b, s]`` token ids -> ``[b, s, h]``, under SP ``[b, s/tp, h]``."""
        if not self.tp.active:
            return F.embedding(tokens, self.weight)
        local = tokens - self.tp.rank * self.weight.shape[0]
        foreign = (local < 0) | (local >= self.weight.shape[0])
        x = F.embedding(local.masked_fill(foreign, 0), self.weight)
        return leave_region(x.masked_fill(foreign.unsqueeze(-1), 0), self.tp)
