"""Which samples each step trains on: all once, but those in windows, whatever the batch size was on the way."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_stable.data import Course, Era, SkipWindows

WINDOWS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 6)).map(lambda w: (w[0], w[0] + w[1])), max_size=4)
STRETCHES = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 40)).map(lambda w: (w[0], sum(w))), max_size=4)
LEGS = st.lists(st.tuples(st.integers(0, 7), st.integers(1, 9), WINDOWS, STRETCHES), min_size=1, max_size=5)


def batch(course: Course, step: int) -> list[int]:
    return [k for piece in course.samples(step) for k in piece]


@settings(deadline=None)
@given(WINDOWS, st.integers(1, 9))
def test_with_one_batch_size_it_is_the_count_of_data_steps(windows: list[tuple[int, int]], size: int) -> None:
    """A data step is the step plus what was skipped before it, and its samples are those of that many batches."""
    course, skipped = Course.begin(size, windows), {d for first, last in windows for d in range(first, last + 1)}
    kept = [d for d in range(1, 100) if d not in skipped]
    for step, data_step in enumerate(kept, 1):
        assert course.data_step(step) == data_step
        assert batch(course, step) == list(range((data_step - 1) * size, data_step * size))
        assert course.stretch(data_step, data_step) == ((data_step - 1) * size, data_step * size)
        assert course.position(step) == data_step * size and course.behind(step) == data_step
        assert course.trained(step) == step * size
    assert course.data_step(0) == course.position(0) == course.behind(0) == course.trained(0) == 0


@settings(max_examples=300, deadline=None)
@given(LEGS)
def test_each_sample_once_whatever_the_batch_size(legs: list) -> None:
    course, step, before = Course.begin(legs[0][1]), 0, list[int]()
    for more, size, configured, interventions in legs:
        position = course.position(step)
        then = course.resumed(step, size, configured, SkipWindows(interventions))
        assert [batch(then, s) for s in range(1, step + 1)] == [batch(course, s) for s in range(1, step + 1)]
        assert [then.data_step(s) for s in range(1, step + 1)] == [course.data_step(s) for s in range(1, step + 1)]
        course, step = then, step + more
        ahead = {k for first, end in interventions for k in range(first, end) if k >= position}
        assert ahead <= {k for first, end in course.skip for k in range(first, end)}
        for s in range(step - more + 1, step + 1):
            assert len(batch(course, s)) == size
            before += batch(course, s)
    kept = [k for k in range(course.position(step)) if k not in course.windows]
    assert before == kept, "in order, each once, none from a window"
    assert course.trained(step) == len(kept)
    for s in range(1, step + 1):
        assert {course.step(k) for k in batch(course, s)} == {s}
        first, last = course.data_steps(batch(course, s)[0], batch(course, s)[-1] + 1)
        low, high = course.stretch(first, last)
        assert first == course.data_step(s) and low <= batch(course, s)[0] and batch(course, s)[-1] < high
    data_steps = [course.data_step(s) for s in range(1, step + 10)]
    assert data_steps == sorted(set(data_steps)), "each step has one of its own, and they rise"
    assert Course.model_validate_json(course.model_dump_json()) == course


def test_where_the_batch_size_changes_the_next_data_step_begins() -> None:
    course = Course.begin(8, [(4, 4)]).resumed(5, 16, [(4, 4)], SkipWindows())
    assert course.eras == (Era(step=0, data_step=0, sample=0, size=8), Era(step=5, data_step=6, sample=48, size=16))
    assert course.samples(5) == (range(40, 48),) and course.samples(6) == (range(48, 64),)
    assert [course.data_step(step) for step in range(8)] == [0, 1, 2, 3, 5, 6, 7, 8]
    assert course.stretch(6, 7) == (40, 64)


def test_a_window_of_the_configuration_means_the_same_samples_for_good() -> None:
    """It neither moves nor is applied anew when the batch size changes, ahead of it or behind."""
    configured = [(3, 3), (9, 10)]
    course = Course.begin(8, configured)
    for step, size in ((1, 16), (3, 4), (6, 8), (20, 32)):
        course = course.resumed(step, size, configured, SkipWindows())
        assert course.skip == ((16, 24), (64, 80))
    again = course.resumed(30, 32, [], SkipWindows()).resumed(31, 32, [(100, 100)], SkipWindows())
    assert again.skip == ((16, 24), (64, 80), again.stretch(100, 100))


def test_back_before_the_change() -> None:
    """A rollback to a checkpoint of another batch size: windows keep the samples that they had in the run."""
    at_four = Course.begin(8)
    ahead = at_four.resumed(10, 16, [(15, 15)], SkipWindows())  # data steps 11, 12, … of 16 samples from sample 80 on
    assert ahead.skip == ((144, 160),)
    back = at_four.resumed(4, 16, [(15, 15)], SkipWindows([(40, 50)]), known=ahead.configured)
    assert back.skip == ((40, 50), (144, 160))
    assert back.samples(5) == (range(32, 40), range(50, 58)) and back.samples(4) == (range(24, 32),)


def test_of_a_checkpoint_that_begins_anew_in_the_data() -> None:
    course = Course(eras=(Era(step=500, data_step=0, sample=0, size=4),))
    assert course.resumed(500, 6, [], SkipWindows()).samples(501) == (range(6),)
    with pytest.raises(ValueError, match="the first step is 501, got 500"):
        course.samples(500)


def test_the_same_time_at_any_step() -> None:
    """No list as long as the run is made: step 10^12 is found among a thousand windows and a hundred eras."""
    course = Course.begin(8)
    for n in range(100):
        interventions = SkipWindows([(10**6 * n + 1000 * i, 10**6 * n + 1000 * i + 13) for i in range(1000)])
        course = course.resumed(100 * n, 8 + n, [], interventions)
    late = course.samples(10**12)
    assert sum(map(len, late)) == 107
    assert course.step(late[0].start) == 10**12


def test_windows_that_never_end() -> None:
    course = Course.begin(4096, [(5, 10**20)])
    assert Course.model_validate_json(course.model_dump_json()) == course
    assert course.samples(4) == (range(3 * 4096, 4 * 4096),) and course.samples(5)[0].start > 10**14
