"""FlexAttention's cap, which is written without tanh, against float64; the kernel itself is tested in tests/gpu."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_stable.model.flex import _score_mod

INDEX = torch.tensor(0)


def capped(x: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Values and slopes."""
    x = x.detach().requires_grad_()
    y = _score_mod(cap)(x, INDEX, INDEX, INDEX, INDEX)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


@pytest.mark.parametrize("cap", [5.0, 30.0, 50.0])
def test_a_logit_is_off_by_no_more_than_3e_7_of_the_cap(cap: float) -> None:
    """Softmax makes of that a relative error of probabilities, of 1.5e-5 for a cap of 50: bf16 rounds them by 2e-3."""
    sizes = torch.logspace(-6, 3, 200_001, dtype=torch.float64) * cap / 50
    x = torch.cat([-sizes.flip(0), torch.zeros(1), sizes]).float()
    y, slope = capped(x, cap)
    wanted = torch.tanh(x.double() / cap)
    assert (y.double() - cap * wanted).abs().max() < 3e-7 * cap
    assert (slope.double() - (1 - wanted.square())).abs().max() < 5e-7
    assert (y.abs() <= cap).all() and (y.diff() >= 0).all()
    assert y[len(sizes)] == 0 and slope[len(sizes)] == 1


def test_one_cap_is_one_function() -> None:
    assert _score_mod(30.0) is _score_mod(30.0) and _score_mod(30.0) is not _score_mod(50.0)
