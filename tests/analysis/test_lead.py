"""Did the gradient norm lead the loss?"""

from __future__ import annotations

import numpy as np
import pytest

from megatron_stable.analysis.lead import NEAR, lead, settings_for
from megatron_stable.analysis.series import Series
from megatron_stable.stability.detector import GRAD_NORM, LOSS, Spike, find_spikes


def loss_spike(onset: int, duration: int = 6) -> Spike:
    """A spike of the loss."""
    return Spike("spike", onset, onset + duration // 2, 5.0, duration, 2.0, 30.0)


def norm_with(*at: tuple[int, int], points: int = 3000, every: int = 1) -> Series:
    """A gradient norm with excursions at ``(first, steps)``, recorded at every so many steps."""
    steps = np.arange(1, points + 1)
    values = 0.3 * np.exp(0.1 * np.random.default_rng(0).standard_normal(points))
    for first, count in at:
        values[first - 1 : first - 1 + count] *= 30
    return Series("grad_norm", steps[::every], values[::every])


@pytest.mark.parametrize("ahead", [-3, 0, 1, 5, NEAR])
def test_by_how_many_steps(ahead: int) -> None:
    assert lead(loss_spike(2000, 10), norm_with((2000 - ahead, 8))) == ahead


def test_what_is_far_before_or_after_does_not_count() -> None:
    assert lead(loss_spike(2000), norm_with((2000 - NEAR - 1, 8))) is None
    assert lead(loss_spike(2000), norm_with((2004, 8))) is None, "after the peak"
    assert lead(loss_spike(2000), norm_with()) is None


def test_of_two_the_first() -> None:
    assert lead(loss_spike(2000), norm_with((1985, 2), (1998, 8))) == 15


def test_recorded_at_every_tenth_step() -> None:
    assert lead(loss_spike(2001, 30), norm_with((1981, 40), every=10)) == 20


def test_at_the_ends_of_the_record() -> None:
    assert lead(loss_spike(100), norm_with((98, 8), points=200)) == 2
    assert lead(loss_spike(100), norm_with((98, 3), points=100)) == 2
    assert lead(loss_spike(500), norm_with(points=100)) is None, "the norm was recorded up to step 100 only"


def test_it_is_the_same_as_with_the_whole_series() -> None:
    norm = norm_with((600, 5), (1700, 3), (2595, 8))
    (found,) = [
        spike for spike in find_spikes(norm.steps.tolist(), norm.values.tolist(), GRAD_NORM) if spike.onset > 2000
    ]
    assert lead(loss_spike(2600), norm) == 2600 - found.onset == 5


def test_norms_multiply_and_losses_add() -> None:
    assert [settings_for(name) for name in ("train/grad_norm", "gnorm", "l2_norm/grad/global")] == [GRAD_NORM] * 3
    assert [settings_for(name) for name in ("train/loss", "lm loss")] == [LOSS] * 2
