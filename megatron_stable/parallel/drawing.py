"""Initial values: each element is a pure function of (seed, the parameter's name, its index in the whole).

    x = mean + std * sqrt(2) * erfinv(edge * t),    edge = erf(cut / sqrt(2)), or 1 without a cut

is the normal distribution by its inverse, of a t that is uniform in (-1, 1): word ``index``, of 32 bits, of
Philox4x64-10 (Salmon et al., SC'11) under the key blake2b(seed:name). Philox counts, so a rank draws its part of a
parameter and nothing else; every element takes one word, so none shifts another, as rejection does; and a parameter
that gets rows of padding keeps the others.

All of it is on the CPU, whatever the device of the run, and in fp64: the last bit of erfinv, in which CPUs and lengths
may differ, is rounded off in fp32. 32 bits reach 6.3 deviations; words of 64 take a quarter more time. Two thirds of it
is erfinv, which in fp32 would take half as long. ``benchmarks/init.py`` measures it.
"""

from __future__ import annotations

import hashlib
from math import erf, prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_stable.parallel.shards import Place

CHUNK = 2**16  # elements at a time: in fp64 they stay in a core's cache
CUT = 2.0  # where a truncated normal distribution is cut, in deviations of its parent
TRUNCATED_STD = 0.8796256610342398  # of a standard normal cut there


def draw(known: Place, seed: int, start: int = 0, numel: int | None = None) -> Tensor:
    """Elements ``[start, start + numel)`` of the flattened slice at a place, fp32 on the CPU; ``None``: to its end."""
    flat = torch.empty(known.numel - start if numel is None else numel)
    draw_into(flat, known, seed, start)
    return flat


@torch.no_grad()
def draw_into(flat: Tensor, known: Place, seed: int, start: int = 0) -> None:
    """Fill a 1-d tensor of any type and device with elements ``[start, start + len(flat))`` of the flattened slice.

    They are rounded to fp32 first, so that those of another type are what a cast of the parameter gives.
    """
    init, words = known.init, _Words(seed, known.name)
    std, edge = (init.std / TRUNCATED_STD, erf(CUT / 2**0.5)) if init.truncated else (init.std, 1.0)
    for first in range(0, len(flat), CHUNK):
        chunk = flat[first : first + CHUNK]
        runs = list(known.runs(start + first, start + first + len(chunk)))
        if init.std:
            x = words.uniform(runs).mul_(edge).erfinv_().mul_(2**0.5 * std)
            if init.mean:
                x += init.mean
        else:
            x = torch.full((len(chunk),), init.mean, dtype=torch.float64)
        factors = _factors(known, runs)
        x = x if factors is None else x.mul_(factors)
        chunk.copy_(x if chunk.dtype == torch.float32 else x.float())


class _Words:
    """The random words of one parameter, which can be read from anywhere."""

    def __init__(self, seed: int, name: str) -> None:
        digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
        self.bits = np.random.Philox(key=int.from_bytes(digest, "little"))
        self.block = 0  # of eight words: the next one that comes

    def uniform(self, runs: list[tuple[int, int]]) -> Tensor:
        """The words of some runs, one after the other, as fp64 in (-1, 1) and symmetric about 0."""
        words = np.concatenate([self._read(index, numel) for index, numel in runs])
        return torch.from_numpy(words).double().add_(0.5).mul_(2.0**-31)

    def _read(self, index: int, numel: int) -> NDArray[np.int32]:
        block, before = divmod(index, 8)
        blocks = -(-(before + numel) // 8)
        if block != self.block:
            self.bits.advance(block - self.block)
        self.block = block + blocks
        return self.bits.random_raw(4 * blocks).view(np.int32)[before : before + numel]


def _factors(known: Place, runs: list[tuple[int, int]]) -> Tensor | None:
    """What padding and pattern multiply elements with, by their row of dimension 0; ``None``: nothing."""
    pattern = [factor for count, factor in known.init.pattern for _ in range(count)] or [1.0]
    real, width = known.init.rows or known.full_shape[0], prod(known.full_shape[1:])
    if pattern == [1.0] and max((index + numel for index, numel in runs), default=0) <= real * width:
        return None
    rows = torch.cat([torch.arange(index, index + numel) for index, numel in runs]) // width
    return torch.tensor(pattern, dtype=torch.float64)[rows % len(pattern)].masked_fill_(rows >= real, 0)
