from __future__ import annotations

from math import inf, nan

import numpy as np
import pytest

from megatron_stable.stability.opinion import (
    APART,
    BATCHES,
    Answer,
    Question,
    Recorded,
    answer,
    decide,
    explains,
    from_before,
    pose,
)

HARD = np.random.default_rng(0).normal(0, 0.3, (2, BATCHES))  # how hard each batch is, against rises of 0.5
HARD = (HARD - HARD.mean(1, keepdims=True)).ravel()


def question(rise: float, dropout: float = 0.0) -> Question:
    """Losses recorded about a rise; ``dropout`` is what training adds to each."""
    losses = 3 + HARD + dropout + np.repeat([0.0, rise], BATCHES)
    batches = [Recorded(n, loss) for n, loss in enumerate(losses.tolist())]
    return Question(BATCHES, tuple(batches[:BATCHES]), tuple(batches[BATCHES:]))


def losses(of_old: float, of_recent: float, noise: float = 0.0, seed: int = 1) -> list[float]:
    """What a state makes of the same batches, without dropout."""
    found = 3 + HARD + np.repeat([of_old, of_recent], BATCHES)
    return (found + noise * np.random.default_rng(seed).normal(size=len(found))).tolist()


def test_the_question_leaves_the_neighbours_of_the_onset_out() -> None:
    memory = [Recorded(step, 3.0 + (step >= 50)) for step in range(1, 61)]
    found = pose(memory, 50)
    assert found is not None and found.rise == 1.0
    assert [batch.step for batch in found.old] == [50 - APART * n for n in range(1, BATCHES + 1)]
    assert [batch.step for batch in found.recent] == [57, 58, 59, 60]
    assert found.steps == (46, 42, 38, 34, 57, 58, 59, 60)


def test_no_question_where_too_little_is_known_or_nothing_rose() -> None:
    memory = [Recorded(step, 3.0 + (step >= 50)) for step in range(1, 61)]
    assert (
        pose(memory, 10) is None
        and pose(memory, 59) is None
        and pose(memory[40:52], 50) is None
        and pose([], 1) is None
    )
    assert pose([batch._replace(loss=3.0) for batch in memory], 50) is None


def test_of_a_rise_that_is_older_than_memory_the_oldest_batches_are_asked_about() -> None:
    memory = [Recorded(step, 3.0 + step / 1000) for step in range(1000, 1500)]
    found = pose(memory, 300)
    assert found is not None and [batch.step for batch in found.old] == [1012, 1008, 1004, 1000]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_state_or_data_by_the_state_at_hand(dropout: float) -> None:
    """Old batches as bad as recent ones: the state. As good as ever: the data. Dropout in training is neither."""
    asked = question(0.5, dropout)
    state, data = answer(asked, losses(0.5, 0.5, 0.02)), answer(asked, losses(0.0, 0.5, 0.02))
    assert (state.gap - asked.rise, data.gap - asked.rise) == pytest.approx((-0.5, 0.0), abs=0.05)
    assert decide(asked, state).verdict == "state" and not explains(asked, state)
    assert decide(asked, data).verdict == "data" and explains(asked, data)


def test_how_hard_a_batch_is_drops_out_of_the_error() -> None:
    found = answer(question(0.5), losses(0.5, 0.5, 0.02))
    assert 0.002 < found.error < 0.03 < np.std(HARD) / BATCHES**0.5


def test_what_the_model_forgot_a_healthy_checkpoint_still_knows() -> None:
    """The state at hand has learnt the new data and forgotten the old: it finds both equally hard."""
    asked = question(0.5)
    now, healthy = answer(asked, losses(0.6, 0.5)), answer(asked, losses(0.1, 1.2))
    assert decide(asked, now).verdict == "state"
    found = decide(asked, now, healthy, 40)
    assert (found.verdict, found.checkpoint, found.healthy) == ("data", 40, healthy)
    assert decide(asked, now, answer(asked, losses(0.1, 0.15)), 40).verdict == "state"


def test_a_checkpoint_from_before_it_had_learnt_anything_is_not_heard() -> None:
    asked = question(0.5)
    now = answer(asked, losses(0.4, 0.5))  # not enough to explain the rise
    ignorant = answer(asked, losses(3.0, 3.1))
    found = decide(asked, now, ignorant, 0)
    assert (found.verdict, found.checkpoint) == ("state", None)


def test_of_a_single_recent_batch_the_spread_of_the_old_ones_is_the_error() -> None:
    asked = question(0.5)
    one = asked._replace(recent=asked.recent[:1])
    found = answer(one, losses(0.0, 0.5, 0.02)[: BATCHES + 1])
    changes = np.array(losses(0.0, 0.5, 0.02)[:BATCHES]) - [batch.loss for batch in one.old]
    assert found.error == pytest.approx(np.std(changes, ddof=1) / BATCHES**0.5)


def test_a_checkpoint_from_before_alone() -> None:
    asked = question(0.5)
    assert from_before(asked, Answer(gap=0.38, error=0.02, behind=0.4)) == "data"
    assert from_before(asked, Answer(gap=0.37, error=0.02, behind=0.4)) == "state"
    assert from_before(asked, Answer(gap=0.37, error=0.02, behind=0.6)) is None
    assert from_before(asked, Answer(gap=0.38, error=0.02, behind=0.6)) == "data"
    infinite = asked._replace(recent=(Recorded(9, inf),))
    assert from_before(infinite, Answer(gap=0.3, error=0.1, behind=0.1)) == "state"
    assert from_before(infinite, answer(infinite, [inf] * 5)) is None, "it is broken itself"


def test_what_lies_within_the_error_is_undecided() -> None:
    asked = question(0.5)
    assert decide(asked, Answer(gap=0.24, error=0.05, behind=0.2)).verdict == "undecided"
    assert decide(asked, Answer(gap=0.27, error=0.05, behind=0.2)).verdict == "undecided"
    assert decide(asked, Answer(gap=0.36, error=0.05, behind=0.1)).verdict == "undecided"
    assert decide(asked, Answer(gap=0.48, error=0.05, behind=0.1)).verdict == "data"
    assert decide(asked, Answer(gap=0.14, error=0.05, behind=0.3)).verdict == "state"


@pytest.mark.parametrize("broken", [nan, inf])
def test_a_state_that_gives_no_number_is_to_blame(broken: float) -> None:
    asked = question(0.5)
    assert decide(asked, answer(asked, [broken, *losses(0, 0)[1:]])).verdict == "state"


@pytest.mark.parametrize("noise", [0.02, 0.05])
def test_error_rates_on_noisy_answers(noise: float) -> None:
    """Of 400 rises of 0.5 nats each way, none is taken for the other; few stay undecided."""
    asked, wrong, undecided = question(0.5), 0, 0
    for seed in range(400):
        for of_old, right in ((0.5, "state"), (0.0, "data")):
            verdict = decide(asked, answer(asked, losses(of_old, 0.5, noise, seed))).verdict
            wrong += verdict not in (right, "undecided")
            undecided += verdict == "undecided"
    assert wrong == 0 and undecided <= 0.05 * 800


def test_a_checkpoint_that_knew_little_may_still_see_that_the_data_are_harder() -> None:
    asked = question(0.5)
    now = answer(asked, losses(0.4, 0.5))
    assert decide(asked, now, answer(asked, losses(3.0, 3.6)), 0).verdict == "data"


def test_a_model_that_is_better_on_the_recent_data_has_forgotten_and_is_not_damaged() -> None:
    asked = question(0.5)
    assert decide(asked, answer(asked, losses(0.9, 0.5))).verdict == "undecided"
    assert decide(asked, answer(asked, losses(0.55, 0.5))).verdict == "state"


def test_a_small_rise_that_may_be_chance_is_neither_the_datas_nor_the_states() -> None:
    """Recent batches may happen to be hard: a gap within that is no change of the data."""
    asked = question(0.05)
    by_chance = Answer(gap=0.05, error=0.01, behind=0.0, chance=0.04)
    assert decide(asked, by_chance).verdict == "undecided"
    assert decide(asked, by_chance, by_chance, 40).verdict == "undecided"
    assert decide(asked, by_chance._replace(chance=0.01, error=0.005)).verdict == "data"
    harmed = Answer(gap=-0.05, error=0.02, behind=0.1, chance=0.04)
    assert decide(asked, harmed, Answer(gap=0.0, error=0.01, behind=0.06, chance=0.04), 40).verdict == "state"


def test_damage_that_is_too_small_is_not_worth_a_verdict() -> None:
    asked, harmed = question(0.05), Answer(gap=-0.05, error=0.01, behind=0.1, chance=0.01)
    judge = Answer(gap=0.0, error=0.01, behind=0.06, chance=0.01)
    assert decide(asked, harmed, judge, 40).verdict == "state"
    assert decide(asked._replace(least=0.11), harmed, judge, 40).verdict == "undecided"
    assert decide(asked._replace(least=0.09), harmed, judge, 40).verdict == "state"
