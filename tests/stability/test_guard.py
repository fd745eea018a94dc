from __future__ import annotations

import json
from math import inf, nan
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from megatron_stable.config.schema import GuardConfig
from megatron_stable.stability.events import Drop, Spike, SpikeEnd
from megatron_stable.stability.guard import Guard, GuardState, Judgement
from megatron_stable.stability.opinion import Answer, Opinion, Question

QUIET = 60  # steps of a healthy run


def guard(fp16: bool = False, **fields: Any) -> Guard:
    """A guard that has seen a healthy run."""
    made = Guard(GuardConfig(**{"warmup": 20, "patience": 5, "max_consecutive_drops": 3, **fields}), fp16)
    noise = np.random.default_rng(0).normal(size=(QUIET, 2))
    for step, (a, b) in enumerate(noise, 1):
        found = made.judge(step, 3 + 0.02 * a, 0.5 * float(np.exp(0.1 * b)))
        assert found.take and not found.bad and not found.events and found.trouble is None
    return made


def kinds(found: Judgement) -> list[str]:
    return [event.event for event in found.events]


def opinion(question: Question, verdict: Any) -> Opinion:
    """A second opinion on a question."""
    return Opinion(verdict, question, Answer(question.rise if verdict == "data" else 0.0, 0.01, 0.0))


@pytest.mark.parametrize(
    ("loss", "norm", "rule"),
    [
        (inf, 0.5, "non-finite loss"),
        (nan, 0.5, "non-finite loss"),
        (3.0, inf, "non-finite gradient"),
        (nan, nan, "non-finite gradient"),
    ],
)
def test_what_is_not_finite_is_dropped(loss: float, norm: float, rule: str) -> None:
    ours = guard()
    found = ours.judge(QUIET + 1, loss, norm)
    assert not found.take and found.bad and found.trouble is None
    (drop,) = found.events
    assert isinstance(drop, Drop) and (drop.rule, drop.consecutive, drop.total) == (rule, 1, 1)
    json.dumps(drop.line(), allow_nan=False)
    then = ours.judge(QUIET + 2, 3.0, 0.5)
    assert then.take and not then.bad and not then.events


def test_watching_takes_every_update_that_can_be_made() -> None:
    ours = guard(mode="watch")
    assert ours.judge(QUIET + 1, inf, 0.5).take
    assert ours.judge(QUIET + 2, 9.0, 500.0).take
    assert not ours.judge(QUIET + 3, 3.0, inf, overflow=True).take, "the engine did not make it"
    for step in range(QUIET + 4, QUIET + 100):
        assert ours.judge(step, 9.0, 500.0).trouble is None


def test_a_spike_that_falls_back() -> None:
    ours = guard()
    up = [ours.judge(QUIET + n, 4.0, 50.0) for n in (1, 2)]
    assert all(found.take and found.bad for found in up)
    spikes = {event.series: event for event in up[0].events if isinstance(event, Spike)}
    assert spikes.keys() == {"grad_norm", "loss"}
    spike = spikes["loss"]
    assert spike.score is not None and spike.score > 8
    assert spike.onset == QUIET + 1 and spike.level == pytest.approx(3, abs=0.05)
    assert up[1].events == ()
    down = [ours.judge(QUIET + n, 3.0, 0.5) for n in (3, 4, 5)]
    ended = [event for found in down for event in found.events if isinstance(event, SpikeEnd)]
    assert sorted(event.series for event in ended) == ["grad_norm", "loss"]
    assert all(found.trouble is None for found in (*up, *down))


def test_spikes_are_dropped_when_asked() -> None:
    ours = guard(drop_spikes=True)
    found = [ours.judge(QUIET + n, 4.0, 0.5) for n in (1, 2, 3)]
    assert [judgement.take for judgement in found] == [False] * 3
    assert found[0].trouble is None
    assert found[2].trouble is not None
    assert (found[2].trouble.rule, found[2].trouble.onset) == ("consecutive drops", QUIET + 1)


def rise(ours: Guard, verdict: Any, steps: int = 16, height: float = 1.0) -> list[tuple[int, Judgement]]:
    """A rise that stays, and what the guard makes of it; second opinions say ``verdict``."""
    found = []
    for n in range(1, steps + 1):
        judgement = ours.judge(QUIET + n, 3.0 + height, 0.5)
        found.append((n, judgement))
        if judgement.question is not None:
            found.append((n, ours.hear(QUIET + n, opinion(judgement.question, verdict), ["b"])))
    return found


def test_a_rise_that_stays_asks_and_recovers_if_the_state_is_to_blame() -> None:
    for mode, recovers in (("recover", True), ("drop", False), ("watch", False)):
        found = rise(guard(mode=mode), "state")
        asked = [n for n, judgement in found if judgement.question is not None]
        assert asked[0] == 5 and asked[1] - asked[0] == 5, "at the end of patience, and again after as long"
        troubles = [(n, judgement.trouble) for n, judgement in found if judgement.trouble is not None]
        assert bool(troubles) == recovers
        if recovers:
            n, trouble = troubles[0]
            assert trouble is not None and (n, trouble.rule, trouble.onset) == (5, "divergence", QUIET + 1)
            assert "0.999 nats since step 61" in trouble.reason


def test_the_question_holds_batches_from_before_and_recent_ones() -> None:
    question = next(judgement.question for _, judgement in rise(guard(), "state") if judgement.question is not None)
    assert [batch.step for batch in question.recent] == [QUIET + n for n in (2, 3, 4, 5)]
    assert [batch.step for batch in question.old] == [QUIET - 3, QUIET - 7, QUIET - 11, QUIET - 15]
    assert question.rise == pytest.approx(1.0, abs=0.05) and question.onset == QUIET + 1


def test_a_rise_of_the_datas_is_a_shift_once_and_the_usual_level_after_three_opinions() -> None:
    ours = guard()
    found = rise(ours, "data", steps=80)
    assert not any(judgement.trouble for _, judgement in found)
    assert [n for n, judgement in found if "second_opinion" in kinds(judgement)] == [5, 10, 20], "then it is the level"
    assert [n for n, judgement in found if "shift" in kinds(judgement)] == [5]
    assert [event.sources for _, judgement in found for event in judgement.events if event.event == "shift"] == [("b",)]
    again = [ours.judge(QUIET + 80 + n, 5.0, 0.5) for n in range(1, 6)]
    assert "spike" in kinds(again[0]) and again[4].question is not None, "a rise above the new level is one"


def test_an_undecided_opinion_is_asked_for_again() -> None:
    found = rise(guard(), "undecided")
    assert [n for n, judgement in found if judgement.question is not None] == [5, 7, 9, 11, 13, 15], "and soon"
    assert not any(judgement.trouble for _, judgement in found) and all(judgement.bad for _, judgement in found)


def test_without_batches_to_ask_about_the_curve_alone_decides() -> None:
    ours = guard()
    ours.forget_batches()
    found = [ours.judge(QUIET + n, 4.0 + 0.3 * n, 0.5) for n in range(1, 8)]
    assert not any(judgement.question for judgement in found)
    troubles = [judgement.trouble for judgement in found if judgement.trouble is not None]
    assert (troubles[0].rule, troubles[0].onset) == ("divergence", QUIET + 1) and troubles[0].step <= QUIET + 6


def test_too_many_drops() -> None:
    ours = guard(max_drops=4)
    troubles = []
    for n in range(1, 40):
        bad = n % 10 == 0
        troubles.append(ours.judge(QUIET + n, nan if bad else 3.0, 0.5).trouble)
    assert troubles == [None] * 39
    last = ours.judge(QUIET + 40, nan, 0.5).trouble
    assert last is not None and last.rule == "total drops"


def test_fp16_overflows_are_the_loss_scales_business() -> None:
    ours = guard(fp16=True)
    for n in range(1, 20):
        found = ours.judge(QUIET + n, 3.0, inf, overflow=True)
        assert found.trouble is None and not found.bad and not found.events and found.take
        assert ours.overflows == n
    assert not ours.judge(QUIET + 20, nan, inf, overflow=True).take, "but not with a loss that is NaN"
    assert ours.consecutive == 1


def test_what_it_knows_survives_a_checkpoint() -> None:
    one = guard()
    one.judge(QUIET + 1, 4.0, 50.0)
    one.judge(QUIET + 2, nan, 0.5)
    other = Guard(one.config)
    other.restore(GuardState.model_validate_json(one.state().model_dump_json()))
    for n in range(3, 20):
        assert one.judge(QUIET + n, 4.0 + 0.1 * n, 0.5) == other.judge(QUIET + n, 4.0 + 0.1 * n, 0.5)
    other.restore(GuardState())
    assert other.judge(QUIET + 20, 99.0, 0.5).take, "which it does again from the start"
    plain = json.loads(one.state().model_dump_json())
    for garbage in ({"detectors": 1}, {**plain, "drops": 3}, {**plain, "memory": [[1]]}, {**plain, "more": 1}):
        with pytest.raises(ValidationError):
            GuardState.model_validate(garbage)


def test_a_rise_that_took_long_is_told_and_left_to_the_user() -> None:
    for near, asks in ((5000, True), (50, False)):
        ours = guard(drift=0.1, near_steps=near, patience=50)
        noise = np.random.default_rng(1).normal(size=1500)
        found = []
        for n, x in enumerate(noise, 1):
            found.append(ours.judge(QUIET + n, 3 + 0.0004 * n + 0.02 * x, 0.5))
            if (question := found[-1].question) is not None:
                found.append(ours.hear(QUIET + n, opinion(question, "state")))
        assert any("second_opinion" in kinds(judgement) for judgement in found)
        assert any(judgement.trouble is not None for judgement in found) == asks


def test_a_spike_however_large_may_fall_back_before_anybody_is_asked() -> None:
    ours = guard(drift=0.05, patience=12)
    noise = 0.02 * np.random.default_rng(1).normal(size=40)
    losses = [*(2.9 + noise), *[5.0] * 10, *[2.9] * 20]  # the lowest level is of just before
    assert not any(ours.judge(QUIET + n, loss, 0.5).question for n, loss in enumerate(losses, 1))


def test_losses_that_stand_out_are_no_part_of_a_slow_rise() -> None:
    ours = guard(drift=0.03, patience=12)
    for n, loss in enumerate([2.9, 3.3, 3.4, 3.5, 3.6, 2.9], 1):
        ours.judge(QUIET + n, loss, 0.5)
    assert not {3.5, 3.6} & {*ours.drift.recent}


def test_a_slow_rise_is_measured_from_where_the_loss_was_lowest() -> None:
    ours = guard(drift=0.03, patience=12)
    noise = 0.02 * np.random.default_rng(1).normal(size=100)
    losses = noise + [*np.linspace(3.0, 2.0, 40), *np.linspace(2.0, 2.3, 60)]
    found = [ours.judge(QUIET + n, loss, 0.5) for n, loss in enumerate(losses, 1)]
    asked = next(judgement.question for judgement in found if judgement.question is not None)
    assert fmean(batch.loss for batch in asked.old) == pytest.approx(2.0, abs=0.06)
