from __future__ import annotations

import json
from math import inf, nan
from typing import Any

import numpy as np
import pytest

from megatron_stable.config.schema import GuardConfig
from megatron_stable.stability.guard import Guard, Judgement

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
    return [kind for kind, _ in found.events]


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
    ((kind, facts),) = found.events
    assert (kind, facts["rule"], facts["consecutive"], facts["total"]) == ("drop", rule, 1, 1)
    json.dumps(facts, allow_nan=False)
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
    assert sorted(facts["series"] for kind, facts in up[0].events if kind == "spike") == ["grad_norm", "loss"]
    spike = next(facts for _, facts in up[0].events if facts["series"] == "loss")
    assert spike["onset"] == QUIET + 1 and spike["score"] > 8 and spike["level"] == pytest.approx(3, abs=0.05)
    assert up[1].events == ()
    down = [ours.judge(QUIET + n, 3.0, 0.5) for n in (3, 4, 5)]
    ended = [facts for found in down for kind, facts in found.events if kind == "spike_end"]
    assert sorted(facts["series"] for facts in ended) == ["grad_norm", "loss"]
    assert all(found.trouble is None for found in (*up, *down))


def test_spikes_are_dropped_when_asked() -> None:
    ours = guard(drop_spikes=True)
    found = [ours.judge(QUIET + n, 4.0, 0.5) for n in (1, 2, 3)]
    assert [judgement.take for judgement in found] == [False] * 3
    assert found[0].trouble is None
    assert found[2].trouble is not None
    assert (found[2].trouble.rule, found[2].trouble.onset) == ("consecutive drops", QUIET + 1)


def test_a_divergence_asks_for_recovery_in_time() -> None:
    for mode, asks in (("recover", True), ("drop", False), ("watch", False)):
        ours = guard(mode=mode)
        found = [ours.judge(QUIET + n, 4.0 + 0.3 * n, 0.5) for n in range(1, 8)]
        troubles = [judgement.trouble for judgement in found if judgement.trouble is not None]
        assert bool(troubles) == asks
        assert any("divergence" in kinds(judgement) for judgement in found)
        if asks:
            assert (troubles[0].rule, troubles[0].onset) == ("divergence", QUIET + 1)
            assert troubles[0].step <= QUIET + 6


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
    other.load(json.loads(json.dumps(one.state(), allow_nan=False)))
    for n in range(3, 20):
        assert one.judge(QUIET + n, 4.0 + 0.1 * n, 0.5) == other.judge(QUIET + n, 4.0 + 0.1 * n, 0.5)
    other.load(None)
    assert other.judge(QUIET + 20, 99.0, 0.5).take, "which it does again from the start"
    for garbage in ({}, {"detectors": {}}, {**one.state(), "drops": 3}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            other.load(garbage)


def test_a_rise_that_took_long_is_told_and_left_to_the_user() -> None:
    for near, asks in ((5000, True), (50, False)):
        ours = guard(drift=0.1, near_steps=near, patience=50)
        noise = np.random.default_rng(1).normal(size=1500)
        found = [ours.judge(QUIET + n, 3 + 0.0004 * n + 0.02 * x, 0.5) for n, x in enumerate(noise, 1)]
        assert any("divergence" in kinds(judgement) for judgement in found)
        assert any(judgement.trouble is not None for judgement in found) == asks
