"""Parameters that know their place in the whole model: full shape, the dimension that TP shards, how they are drawn."""

from __future__ import annotations

from dataclasses import replace
from math import nan

import torch
from torch import nn

from megatron_stable.parallel.drawing import draw_into
from megatron_stable.parallel.shards import Init, Place
from megatron_stable.parallel.topology import TensorParallel


def parameter(
    shape: tuple[int, ...],
    init: Init,
    tp: TensorParallel | None = None,
    dim: int | None = None,
    partial: bool = False,
) -> nn.Parameter:
    """A parameter of full ``shape``, of which dimension ``dim`` is sharded over ``tp``; NaN until drawn or loaded.

    ``partial``: it is replicated, and each TP rank computes a part of its gradient (of its positions, of its heads).
    Whoever trains it sums these parts over TP, once per step.

    Raises:
        ValueError: ``dim`` is not divisible by the TP size.
    """
    low = high = 0
    if dim is not None:
        rank, size = (tp.rank, tp.size) if tp is not None else (0, 1)
        if shape[dim] % size:
            raise ValueError(f"dimension {dim} of {shape} is not divisible by {size} (TP)")
        low, high = (shape[dim] // size * edge for edge in (rank, rank + 1))
    known = Place(shape, dim, low, high, init)
    weight = nn.Parameter(torch.full(known.shape, nan))
    weight.place = known  # type: ignore[attr-defined]
    # the mark by which DeepSpeed counts every shard in the gradient norm, replicated parameters only once
    weight.tensor_model_parallel = weight.model_parallel = dim is not None  # type: ignore[attr-defined]
    weight.partial = partial  # type: ignore[attr-defined]
    return weight


def is_partial(weight: nn.Parameter) -> bool:
    """Whether the gradient that autograd gives this TP rank is a part, to be summed over TP."""
    found: bool = weight.partial  # type: ignore[attr-defined]
    return found


def place(weight: nn.Parameter) -> Place:
    """The place of a parameter made by :func:`parameter`."""
    found: Place = weight.place  # type: ignore[attr-defined]
    return found


def name_parameters(module: nn.Module, prefix: str) -> None:
    """Give each parameter of ``module`` its global name: ``prefix`` and its own; a tied one keeps its first."""
    for name, weight in module.named_parameters():
        known = place(weight)
        if not known.name:
            weight.place = replace(known, name=f"{prefix}.{name}")  # type: ignore[attr-defined]


def initialize(module: nn.Module, seed: int) -> None:
    """Draw this rank's slice of every parameter of ``module`` (see :func:`name_parameters`)."""
    for weight in module.parameters():
        draw_into(weight.detach().view(-1), place(weight), seed)
