"""What was learnt and lost again: the rise of a loss as a part of that; a run that has lost it for good ends."""

from __future__ import annotations

from math import inf, nan
from statistics import median

import numpy as np
import pytest

from megatron_stable.config.schema import GuardConfig
from megatron_stable.stability.collapse import RECENT, Collapse
from megatron_stable.stability.guard import Guard, GuardState

FALL = [5.0 - 0.1 * step for step in range(31)]  # to 2.0


def after(losses: list[float | None], part: float = inf) -> Collapse:
    collapse = Collapse()
    for step, loss in enumerate(losses, 1):
        collapse = collapse.followed_by(step, loss, part)
    return collapse


def test_the_rise_is_a_part_of_what_was_learnt() -> None:
    lowest = median(FALL[-RECENT:])
    for level, rise in (
        (lowest, 0.0),
        (3.5, (3.5 - lowest) / (5 - lowest)),
        (5.0, 1.0),
        (8.0, (8 - lowest) / (5 - lowest)),
    ):
        collapse = after([*FALL, *[level] * RECENT])
        assert collapse.rise == pytest.approx(min(rise, collapse.rise) if level == lowest else rise)
        assert collapse.lowest == pytest.approx(min(lowest, level))


def test_spikes_do_not_count_and_losses_that_are_not_finite_do() -> None:
    spiked = after([*FALL, *[9.0] * (RECENT // 2), *[2.0] * (RECENT // 2 + 1)])
    assert spiked.rise < 0.01
    assert after([*FALL, *[nan] * (RECENT // 2 + 1)]).rise == inf
    assert after([*FALL, *[None] * RECENT, *[2.0] * RECENT]).rise == 0
    assert after([None, nan]).rise == inf, "nothing was ever learnt"


def test_who_has_learnt_nothing_can_only_rise() -> None:
    assert after([5.0] * 30).rise == 0
    assert after([5.0, *[5.5] * 30]).rise == pytest.approx(0.5 / 0.25)


def test_noise_about_a_loss_that_does_not_fall_is_no_collapse() -> None:
    for seed in range(20):
        losses = 9.2 + 0.05 * np.random.default_rng(seed).standard_normal(300)
        collapse = Collapse()
        for step, loss in enumerate(losses, 1):
            collapse = collapse.followed_by(step, float(loss), 0.5)
            assert collapse.onset is None or step - collapse.onset < 50


def test_the_onset_is_where_the_level_went_too_high_to_stay() -> None:
    assert after([*FALL, *[4.0] * 20], 0.5).onset == len(FALL) + RECENT // 2 + 1
    assert after([*FALL, *[4.0] * 20, *[2.0] * RECENT], 0.5).onset is None
    assert after([*FALL, *[4.0] * 20], 0.9).onset is None


@pytest.mark.parametrize("mode", ["watch", "drop", "recover"])
def test_the_guard_ends_a_run_that_has_collapsed_and_goes_on_from_its_state(mode: str) -> None:
    config = GuardConfig(mode=mode, collapse=0.5, collapse_steps=10, warmup=1000, window=1000)  # type: ignore[arg-type]
    losses = [*FALL, *[4.0] * 30]
    first = len(FALL) + RECENT // 2 + 1
    guard = Guard(config)
    for step, loss in enumerate(losses, 1):
        if step == first + 3:  # resumed
            guard = Guard(config, state=GuardState.model_validate_json(guard.state().model_dump_json()))
        trouble = guard.judge(step, loss, 1.0).trouble
        assert (trouble is not None) == (step >= first + 9), step
        if trouble is not None:
            assert trouble.onset == first and trouble.rule == "collapse"
            assert "of what was learnt is lost" in trouble.reason


def test_without_it_nothing_is_ended() -> None:
    guard = Guard(GuardConfig(mode="watch", warmup=1000, window=1000))
    assert all(guard.judge(step, loss, 1.0).trouble is None for step, loss in enumerate([*FALL, *[9.0] * 99], 1))
