"""What a rank does on its own columns of the logits for their cross-entropy, forward and backward; here in PyTorch.

``cross_entropy_kernels.py`` has the same steps for CUDA, ``loss.py`` what lies between them and between the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_stable.model.elementwise import soft_cap

CHUNK = 2**24  # logits in fp32 at a time
IN_CACHE = 2**18  # the same on a CPU, half as many as a core's cache holds


class Columns(NamedTuple):
    """A rank's columns of the (padded) vocabulary.

    Attributes:
        start: Number of the first.
        valid: How many of them, from the first on, are no padding.
        cap: Each logit y counts as cap x tanh(y / cap); ``None``: as it is.
    """

    start: int
    valid: int
    cap: float | None


class Steps(NamedTuple):
    """The two steps, in whatever way they are computed. Logits are ``[n, v/tp]``, all else ``[n]``.

    Attributes:
        statistics: ``(logits, targets, columns)`` -> ``[3, n]`` in fp32 or better: of each row the maximum, the sum of
            exp(logit - maximum), and the target's logit, which is 0 where another rank has it.
        gradient: ``(logits, targets, log_z, of_target, of_all, columns)`` -> softmax x ``of_all`` - onehot(target) x
            ``of_target``, times the slope of the cap; of the logits' dtype and shape.
        in_place: Whether the gradient is written over the logits.
    """

    statistics: Callable[[Tensor, Tensor, Columns], Tensor]
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Columns], Tensor]
    in_place: bool


def _statistics(logits: Tensor, targets: Tensor, columns: Columns) -> Tensor:
    valid, cap = columns.valid, columns.cap
    found = logits.new_zeros(3, len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
    top, total, target = found
    lowest = torch.finfo(found.dtype).min  # of no columns, or where all are -inf, as inf - inf is not 0
    top.fill_(lowest)
    if valid:
        top.copy_(_capped(logits[:, :valid].amax(1).to(top.dtype), cap).clamp_(min=lowest))
    for rows in _chunks(logits):
        total[rows] = (_capped(logits[rows, :valid].to(top.dtype), cap) - top[rows, None]).exp_().sum(1)
    local, mine = _local(targets, columns)
    target.copy_(_capped(logits.gather(1, local[:, None])[:, 0].to(top.dtype), cap).masked_fill(~mine, 0))
    return found


def _gradient(
    logits: Tensor, targets: Tensor, log_z: Tensor, of_target: Tensor, of_all: Tensor, columns: Columns
) -> Tensor:
    valid, cap = columns.valid, columns.cap
    local, mine = _local(targets, columns)
    of_target = of_target.masked_fill(~mine, 0)

    def chunk(rows: slice) -> Tensor:  # a function, so that a chunk is gone when the next one comes
        capped = _capped(logits[rows].to(log_z.dtype), cap)
        grad = (capped - log_z[rows, None]).exp_().mul_(of_all[rows, None])
        grad[:, valid:] = 0
        # before rounding to the logits' dtype: the two terms cancel where the model is sure of itself
        grad.scatter_add_(1, local[rows, None], -of_target[rows, None])
        return grad if cap is None else grad.mul_(1 - (capped / cap).square_())

    grad = torch.empty_like(logits)
    for rows in _chunks(logits):
        grad[rows] = chunk(rows)
    return grad


PYTORCH = Steps(_statistics, _gradient, in_place=False)


def _chunks(logits: Tensor) -> Iterator[slice]:
    most = IN_CACHE if logits.device.type == "cpu" else CHUNK
    rows = max(1, most // max(1, logits.shape[1]))
    return (slice(start, start + rows) for start in range(0, logits.shape[0], rows))


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else soft_cap(logits, cap)


def _local(targets: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
    """Column of each target, 0 where it is another rank's; whether it is this one's."""
    local = targets - columns.start
    mine = (local >= 0) & (local < columns.valid)
    return local.masked_fill_(~mine, 0), mine
