"""Learning rates against the reference's formulas, and at the places where they are known."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_stable.config.schema import Config
from megatron_stable.optim.schedule import learning_rate
from tests.reference import optimizer as reference

KINDS = ["constant", "linear", "cosine", "wsd", "inverse_sqrt"]


def config(kind: str, steps: int, warmup: int, fraction: float = 0.1, peak: float = 1.0, low: float = 0.1) -> Config:
    values: dict[str, Any] = {
        "run": {"steps": steps},
        "optimizer": {"learning_rate": peak},
        "schedule": {"kind": kind, "warmup_steps": warmup, "min_learning_rate": low, "decay_fraction": fraction},
    }
    return Config.model_validate(values)


@settings(deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    steps=st.integers(1, 500),
    warmup=st.integers(0, 499),
    fraction=st.floats(0.001, 1.0),
    peak=st.floats(1e-5, 1.0),
    share=st.floats(0.0, 1.0),
    data=st.data(),
)
def test_equals_the_reference_at_every_step(
    kind: str, steps: int, warmup: int, fraction: float, peak: float, share: float, data: st.DataObject
) -> None:
    warmup = min(warmup, steps - 1)
    cfg = config(kind, steps, warmup, fraction, peak, peak * share)
    for step in {1, warmup, warmup + 1, steps, data.draw(st.integers(1, steps))} - {0}:
        assert learning_rate(cfg, step) == pytest.approx(reference.learning_rate(step, cfg), rel=1e-9, abs=1e-12 * peak)


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_rises_linearly_to_the_peak(kind: str) -> None:
    cfg = config(kind, 100, 10)
    assert [learning_rate(cfg, step) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(cfg, 11) <= 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_without_warm_up_the_first_step_is_the_start_of_the_decay(kind: str) -> None:
    assert learning_rate(config(kind, 100, 0), 1) == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "middle", "last"),
    [("constant", 1.0, 1.0), ("linear", 0.55, 0.1), ("cosine", 0.55, 0.1), ("wsd", 1.0, 0.1)],
)
def test_known_points(kind: str, middle: float, last: float) -> None:
    cfg = config(kind, 110, 10)
    assert learning_rate(cfg, 60) == pytest.approx(middle)
    assert learning_rate(cfg, 110) == pytest.approx(last)


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd", "inverse_sqrt"])
def test_never_below_the_minimum_also_beyond_the_last_step(kind: str) -> None:
    cfg = config(kind, 100, 10)
    rates = [learning_rate(cfg, step) for step in range(10, 5000)]
    assert rates == sorted(rates, reverse=True)
    assert min(rates) == pytest.approx(0.1)


def test_wsd_decays_over_its_fraction_of_all_steps() -> None:
    cfg = config("wsd", 1000, 10, fraction=0.2)
    assert learning_rate(cfg, 800) == 1.0
    assert learning_rate(cfg, 801) < 1.0
    assert learning_rate(cfg, 900) == pytest.approx(0.55)


def test_inverse_square_root_halves_at_four_times_the_warm_up() -> None:
    assert learning_rate(config("inverse_sqrt", 1000, 25), 100) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_after_surgery_it_rises_again_to_where_it_stands(kind: str) -> None:
    plain = config(kind, 100, 10)
    again = plain.model_copy(update={"schedule": plain.schedule.model_copy(update={"rewarm": (40, 8)})})
    shares = [learning_rate(again, step) / learning_rate(plain, step) for step in range(39, 52)]
    assert shares == pytest.approx([1, 1, *(n / 8 for n in range(1, 9)), 1, 1, 1])
    assert all(
        learning_rate(again, step) == pytest.approx(reference.learning_rate(step, again)) for step in range(1, 101)
    )
