from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_stable.config.schema import GuardConfig
from megatron_stable.data import Course, SkipWindows
from megatron_stable.stability.interventions import Interventions
from megatron_stable.stability.recovery import Candidate, Trouble, attempt, choose, last_resort, plan, window

SETTINGS = GuardConfig()
COURSE = Course.begin(8)


def at(*steps: int, healthy: bool | None = True) -> list[Candidate]:
    return [Candidate(step, step, healthy) for step in steps]


def test_the_newest_healthy_checkpoint_far_enough_before_the_onset() -> None:
    chosen, _ = choose(at(100, 200, 300, 400), onset=410, rollback_steps=100)  # type: ignore[misc]
    assert chosen.step == 300
    assert choose(at(100, 200, 300, 310), 410, 100)[0].step == 310  # type: ignore[index]


def test_the_next_best_where_none_is_far_enough() -> None:
    near, why = choose(at(350, 380), 410, 100)  # type: ignore[misc]
    assert near.step == 350
    assert "less than 100" in why
    unjudged = [*at(100, healthy=False), *at(200, 300, 400, healthy=None)]
    assert choose(unjudged, 410, 100)[0].step == 300  # type: ignore[index]
    assert choose(at(100, 200, healthy=False), 410, 100)[0].step == 100  # type: ignore[index]
    late, why = choose(at(410, 500), 410, 100)  # type: ignore[misc]
    assert late.step == 410
    assert "none is from before the onset" in why
    assert choose([], 410, 100) is None


def test_palms_window() -> None:
    """Back about 100 steps before the spike, and 200 batches skipped that cover those before and during it."""
    assert window(position=400, onset=500, found=520, length=200) == (401, 600)
    assert window(position=100, onset=500, found=520, length=200) == (400, 599), "not what lies far before the spike"
    assert window(position=400, onset=500, found=900, length=200) == (401, 900), "all of a long spike"


@given(st.integers(0, 1000), st.integers(1, 1000), st.integers(0, 500), st.integers(1, 500))
def test_a_window_lies_after_the_checkpoint_and_covers_the_trouble(
    position: int, ahead: int, long: int, n: int
) -> None:
    onset = position + ahead
    first, last = window(position, onset, onset + long, n)
    assert position < first <= onset <= onset + long <= max(last, onset + long) == last or n < 2
    assert last - first + 1 >= n


def test_the_ladder_and_its_end() -> None:
    done, tried = Interventions(), []
    for onset in (1000, 1100, 1050, 1200):
        intervention = plan(Trouble("divergence", onset, onset + 50, "it rose"), at(600, 900), COURSE, done, SETTINGS)
        if intervention is None:
            break
        tried.append(intervention)
        done = done.add(intervention)
    made = [(each.learning_rate_factor, each.clip_factor, each.rollback_to) for each in tried]
    assert made == [(1.0, 1.0, 900), (0.7, 1.0, 900), (0.7, 0.5, 600)]
    (one,), (two,), (four,) = (each.windows for each in tried)
    assert [last - first + 1 for first, last in (one, two, four)] == [200, 400, 800]
    assert done.learning_rate_factor == 0.7 * 0.7
    again = last_resort(Trouble("divergence", 1200, 1250, "it rose"), at(700, 900), SETTINGS)
    assert again is not None
    assert (again.rollback_to, again.windows, again.learning_rate_factor) == (900, (), 1.0)


def test_trouble_elsewhere_begins_the_ladder_anew() -> None:
    intervention = plan(Trouble("divergence", 1000, 1050, "it rose"), at(900), COURSE, Interventions(), SETTINGS)
    assert intervention is not None
    done = Interventions((intervention,))
    assert attempt(done, 1000 + SETTINGS.near_steps, SETTINGS.near_steps) == 1
    assert attempt(done, 1000 + SETTINGS.near_steps - 1, SETTINGS.near_steps) == 2
    assert attempt(done, 900, SETTINGS.near_steps) == 2
    by_hand = Interventions((intervention.model_copy(update={"by": "user"}),))
    assert attempt(by_hand, 1001, SETTINGS.near_steps) == 1, "the user did something else"


def test_nothing_to_go_back_to() -> None:
    trouble = Trouble("divergence", 10, 60, "it rose")
    assert plan(trouble, [], COURSE, Interventions(), SETTINGS) is None
    assert last_resort(trouble, [], SETTINGS) is None


def test_what_is_skipped_is_told_in_data_steps_and_holds_in_samples() -> None:
    trouble = Trouble("divergence", 1000, 1050, "it rose")
    intervention = plan(trouble, at(800), COURSE, Interventions(), SETTINGS)
    assert intervention is not None and intervention.windows == ((900, 1099),)
    assert intervention.samples == ((899 * 8, 1099 * 8),)
    changed = COURSE.resumed(980, 16, [], SkipWindows())  # data step 981 begins with sample 7840
    intervention = plan(trouble, at(800), changed, Interventions(), SETTINGS)
    assert intervention is not None and intervention.windows == ((900, 1099),)
    assert intervention.samples == ((899 * 8, 7840 + (1099 - 980) * 16),)


def test_the_whole_batch_of_the_trouble_is_skipped_where_it_lies_across_data_steps() -> None:
    """A window made with another batch size cuts a batch in two."""
    course = COURSE.resumed(10, 16, [], SkipWindows([(180, 189)]))
    assert course.samples(17) == (range(176, 180), range(189, 201))
    intervention = plan(Trouble("drops", 17, 17, "inf"), at(10), course, Interventions(), GuardConfig(skip_steps=1))
    assert intervention is not None and intervention.windows == ((17, 18),)
    assert intervention.samples == ((176, 208),)


def test_surgery_is_the_last_rung_and_is_taken_once() -> None:
    settings = GuardConfig(max_rollbacks=1, rollback_steps=10, widen=(1.0, 4.0), near_steps=300)
    trouble, there = Trouble("divergence", 100, 110, "it rose"), at(50, 60, 80, 90)
    wanted = {"model.qk_norm": (False, True)}
    first = plan(trouble, there, COURSE, Interventions(), settings, surgery=wanted)
    assert first is not None
    assert (first.changes, first.windows != ()) == ({}, True)
    done = Interventions((first,))
    assert plan(trouble, there, COURSE, done, settings) is None, "there is no such rung"
    last = plan(trouble, there, COURSE, done, settings, fp16=True, surgery=wanted)
    assert last is not None
    assert (last.changes, last.rollback_to, last.windows) == (wanted, 60, ())
    assert last.reset_loss_scale
    assert "1 attempt did not help: it rose" in last.reason
    again = plan(trouble, there, COURSE, done.add(last), settings, surgery=wanted)
    assert again is not None, "the other model has attempts of its own"
    assert again.windows
    assert plan(trouble, there, COURSE, done.add(last).add(again), settings, surgery=wanted) is None
