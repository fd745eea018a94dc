"""Parameters that know their place in the whole model.

Each parameter carries its full shape, the dimension that TP shards, and how it is drawn. Its values come from
a random stream of its own, seeded by (run seed, global name) and drawn at full size before slicing, so the
function that a seed names does not depend on the layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from megatron_stable.parallel.shards import Init, Place
from megatron_stable.parallel.topology import TensorParallel

CHUNK = 2**24  # elements drawn at a time, which bounds the memory that drawing at full size takes
TRUNCATED_STD = 0.8796256610342398  # of a standard normal cut at +-2


def parameter(
    shape: tuple[int, ...], init: Init, tp: TensorParallel | None = None, dim: int | None = None
) -> nn.Parameter:
    """An empty parameter of full ``shape``, of which dimension ``dim`` is sharded over ``tp``.

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
    weight = nn.Parameter(torch.empty(known.shape))
    weight.place = known  # type: ignore[attr-defined]
    # the mark by which DeepSpeed counts every shard in the gradient norm, replicated parameters only once
    weight.tensor_model_parallel = weight.model_parallel = dim is not None  # type: ignore[attr-defined]
    return weight


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


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> None:
    """Draw every parameter of ``module`` (see :func:`name_parameters`)."""
    for weight in module.parameters():
        _draw(weight, place(weight), seed)


def draw_full(known: Place, seed: int) -> Tensor:
    """The full-size fp32 tensor that ``seed`` names at this place, on the CPU."""
    return torch.cat([rows for _, rows in _stream(known, seed)])


def _draw(weight: nn.Parameter, known: Place, seed: int) -> None:
    if known.dim is None or known.dim > 0:
        for start, rows in _stream(known, seed):
            weight[start : start + len(rows)] = known.slice(rows)
        return
    first = known.low
    for start, rows in _stream(known, seed):
        low, high = max(start, first), min(start + len(rows), first + len(weight))
        if low < high:
            weight[low - first : high - first] = rows[low - start : high - start]


def _stream(known: Place, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Rows of dimension 0 in chunks of bounded size, as (first row, rows)."""
    shape, init = known.full_shape, known.init
    digest = hashlib.blake2b(f"{seed}:{known.name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    step = max(1, CHUNK // max(1, prod(shape[1:])))
    factors = torch.cat([torch.full((count,), factor) for count, factor in init.pattern or ((1, 1.0),)])
    for start in range(0, shape[0], step):
        rows = torch.full((min(step, shape[0] - start), *shape[1:]), init.mean)
        if init.truncated:
            std = init.std / TRUNCATED_STD
            nn.init.trunc_normal_(rows, init.mean, std, init.mean - 2 * std, init.mean + 2 * std, generator=generator)
        elif init.std:
            rows.normal_(init.mean, init.std, generator=generator)
        if init.rows is not None and start + len(rows) > init.rows:
            rows[max(0, init.rows - start) :] = 0
        if init.pattern:
            rows *= factors[torch.arange(start, start + len(rows)) % len(factors)].view(-1, *(1 for _ in shape[1:]))
        yield start, rows
