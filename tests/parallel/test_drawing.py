"""Initial values: the distribution, and that an element depends on seed, name and index alone."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from math import erf, prod
from statistics import NormalDist
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_stable.parallel import drawing
from megatron_stable.parallel.drawing import CHUNK, draw, draw_into
from megatron_stable.parallel.shards import Init, Place

NORMAL = NormalDist()
INITS = {"normal": Init(std=0.3), "truncated": Init(std=0.3, truncated=True)}


def matrix(*shape: int, name: str = "w", init: Init = INITS["normal"]) -> Place:
    return Place(shape, init=init, name=name)


def by_hand(name: str, seed: int, index: int, init: Init) -> float:
    """One element, from numpy's raw words and Python's own inverse of the normal distribution."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest(), "little")
    pair = int(np.random.Philox(key=key, counter=index // 8).random_raw(4)[index % 8 // 2])
    word = pair >> 32 if index % 2 else pair & 0xFFFFFFFF
    u = (word + 2**31 + 0.5) / 2**32 % 1  # words count as signed
    if not init.truncated:
        return init.std * NORMAL.inv_cdf(u)
    low = NORMAL.cdf(-2)
    return init.std / 0.8796256610342398 * NORMAL.inv_cdf(low + u * (1 - 2 * low))


@pytest.mark.parametrize("init", INITS.values(), ids=INITS)
def test_each_element_is_the_inverse_of_the_distribution_at_its_own_word(init: Init) -> None:
    found = draw(matrix(3, CHUNK, init=init), 7)
    for index in (0, 1, 2, 3, 4, 8, 1001, CHUNK - 1, CHUNK, 2 * CHUNK + 6, 3 * CHUNK - 1):
        assert float(found[index]) == pytest.approx(by_hand("w", 7, index, init), rel=3e-7), index


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_any_stretch_of_any_slice_is_cut_out_of_the_whole(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    init = data.draw(
        st.builds(
            Init,
            std=st.sampled_from([0.0, 1.0]),
            mean=st.sampled_from([0.0, 2.0]),
            truncated=st.booleans(),
            rows=st.none() | st.integers(1, shape[0]),
            pattern=st.sampled_from([(), ((1, 0.5), (2, 3.0))]),
        )
    )
    whole = Place(shape, init=init, name="w")
    dim = data.draw(st.none() | st.integers(0, len(shape) - 1))
    low = data.draw(st.integers(0, shape[dim] - 1)) if dim is not None else 0
    high = data.draw(st.integers(low + 1, shape[dim])) if dim is not None else 0
    part = replace(whole, dim=dim, low=low, high=high)
    start = data.draw(st.integers(0, part.numel))
    numel = data.draw(st.integers(0, part.numel - start))
    with mock.patch.object(drawing, "CHUNK", data.draw(st.sampled_from([4, 7, CHUNK]))):
        found = draw(part, 3, start, numel)
    wanted = part.slice(draw(whole, 3).view(shape)).flatten()[start : start + numel]
    assert torch.equal(found, wanted)


def test_padding_and_pattern_act_on_rows() -> None:
    plain = draw(matrix(9, 5), 1).view(9, 5)
    made = draw(matrix(9, 5, init=replace(INITS["normal"], rows=7, pattern=((2, 1.0), (1, 0.5)))), 1).view(9, 5)
    factors = torch.tensor([1, 1, 0.5, 1, 1, 0.5, 1, 0, 0]).view(-1, 1)
    assert torch.equal(made, plain * factors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_another_type_gets_what_a_cast_gives(dtype: torch.dtype) -> None:
    flat = torch.empty(2 * CHUNK + 3, dtype=dtype)
    draw_into(flat, matrix(3, CHUNK), 1)
    assert torch.equal(flat, draw(matrix(3, CHUNK), 1)[: len(flat)].to(dtype))


def cdf(x: Tensor, init: Init) -> Tensor:
    """Of the distribution that ``init`` asks for."""
    std = init.std / 0.8796256610342398 if init.truncated else init.std
    edge = erf(2**0.5) if init.truncated else 1.0
    return (torch.erf(x.double() / (std * 2**0.5)) / edge + 1) / 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("init", INITS.values(), ids=INITS)
def test_kolmogorov_smirnov_and_moments(init: Init, seed: int) -> None:
    n = 2**20
    x = draw(matrix(n, init=init), seed).double()
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    below = cdf(x.sort().values, init)
    distance = max(float((below - steps[:-1]).max()), float((steps[1:] - below).max()))
    assert distance * n**0.5 < 1.95, "rarer than one in a thousand"
    assert abs(float(x.mean())) < 4 * init.std / n**0.5
    assert float(x.square().mean().sqrt()) == pytest.approx(init.std, rel=4 / n**0.5)
    assert float((x**3).mean()) / init.std**3 == pytest.approx(0, abs=4 * (15 / n) ** 0.5)
    assert float(x.abs().max()) / init.std > (2.27 if init.truncated else 4.5)
    assert not init.truncated or float(x.abs().max()) <= 2 * init.std / 0.8796256610342398 * (1 + 1e-6)


def test_seeds_names_and_lags_are_independent() -> None:
    n = 2**16
    streams = [draw(matrix(n, name=name), seed) for seed in (1, 2) for name in ("w", "v", "blocks.1.w", "blocks.11.w")]
    streams += [streams[0].roll(lag) for lag in (1, 2, 3, 4, 8, 64, 4096)]
    x = torch.stack([stream / stream.norm() for stream in streams]).double()
    off_diagonal = x @ x.T - torch.eye(len(x))
    assert float(off_diagonal.abs().max()) < 5 / n**0.5


@pytest.mark.parametrize("dim", [0, 1])
def test_a_rank_draws_its_own_part_and_no_more(dim: int) -> None:
    drawn = 0
    original = drawing._Words.uniform

    def counted(self: drawing._Words, runs: list[tuple[int, int]]) -> Tensor:
        nonlocal drawn
        drawn += sum(numel for _, numel in runs)
        return original(self, runs)

    with mock.patch.object(drawing._Words, "uniform", counted):
        draw(Place((512, 1024), dim, 3 * 64, 4 * 64, INITS["normal"], "w"), 1)
    assert drawn == 512 * 1024 // (8 if dim == 0 else 16)
    assert drawn == prod(Place((512, 1024), dim, 3 * 64, 4 * 64).shape)
