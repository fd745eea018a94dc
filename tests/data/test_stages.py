"""Stages against a simulation that counts: each source in its own order, none of it twice, none of it lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import floor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_stable.data import (
    Blend,
    Course,
    SkipWindows,
    Stage,
    Stages,
    Stream,
    TokenDataset,
    open_dataset,
    open_source,
    stream_of,
)
from megatron_stable.errors import ConfigError, DataError

NAMES = "abcd"
STREAMS = {name: Stream(paths=f"data/{name}", tokens=100, documents=10) for name in NAMES}
FARTHEST = 350  # 6 legs of 6 steps of 7 samples, and what is skipped before sample 90


def stages(*blends: tuple[int, dict[str, float]]) -> tuple[Stage, ...]:
    return tuple(Stage(sample=sample, weights=weights) for sample, weights in blends)


class Simulation:
    """The order of the data, written down sample by sample."""

    def __init__(self, blends: Sequence[Stage]) -> None:
        self.order: list[tuple[str, int]] = []
        self.go_on(blends)

    def go_on(self, blends: Sequence[Stage], sample: int = 0) -> None:
        """Another order from a sample on; a blend that only goes on is not begun anew."""
        before = self.current[sample - 1] if sample else None
        self.order = self.order[:sample]
        self.current: list[tuple[int, dict[str, Fraction]]] = self.current[:sample] if sample else []
        taken = Counter(name for name, _ in self.order)
        parts = {each.sample: self.shares(each) for each in blends}
        for k in range(sample, FARTHEST):
            shares = parts[max(begin for begin in parts if begin <= k)]
            if before is None or before[1] != shares:
                before = k, shares
            begin, shares = before
            had, due = self.due(k - begin, shares), self.due(k + 1 - begin, shares)
            (name,) = (each for each in shares if due[each] > had[each])
            self.order.append((name, taken[name]))
            self.current.append(before)
            taken[name] += 1

    @staticmethod
    def shares(stage: Stage) -> dict[str, Fraction]:
        exact = {name: Fraction(str(weight)) for name, weight in stage.weights.items()}
        return {name: weight / sum(exact.values()) for name, weight in exact.items()}

    @staticmethod
    def due(turns: int, shares: dict[str, Fraction]) -> dict[str, int]:
        """Of a blend's turns those of each source: the rounded part of what those before it have left."""
        due, left = {}, Fraction(1)
        for name, share in shares.items():
            due[name] = floor((turns - sum(due.values())) * share / left + Fraction(1, 2))
            left -= share
        return due


WEIGHTS = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 9).map(float), min_size=1)
BLENDS = st.builds(
    lambda first, rest: stages((0, first), *sorted(rest.items())),
    WEIGHTS,
    st.dictionaries(st.integers(1, 90), WEIGHTS, max_size=3),
)
WINDOWS = st.lists(st.tuples(st.integers(0, 70), st.integers(1, 20)).map(lambda w: (w[0], sum(w))), max_size=2)
LEGS = st.lists(st.tuples(BLENDS, st.integers(0, 6), st.integers(1, 7), st.booleans(), WINDOWS), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(LEGS)
def test_no_source_repeats_or_loses_anything(legs: list) -> None:
    """Through stages, resumes with other blends, sources that come and go, batch sizes, windows and going back."""
    blends, _, size, _, _ = legs[0]
    order, course, simulation = Stages.begin(STREAMS, blends), Course.begin(size), Simulation(blends)
    step, stored = 0, [(0, course, order)]
    for wanted, steps, size, back, windows in legs:
        if back:
            step, course, _ = stored[len(stored) // 2]  # the run's own order stays; the checkpoint's is passed over
        skip = SkipWindows(windows)
        course = course.resumed(step, size, [], skip)
        sample = course.open(step, skip)
        assert all(k in course.windows for k in range(course.position(step), sample)) or sample <= max(
            end for _, end in windows
        )
        now = order.resumed(sample, STREAMS, wanted)
        if [(each.sample, each.shares) for each in wanted] != [(each.sample, each.shares) for each in order.configured]:
            simulation.go_on(wanted, sample)
        order = now
        step += steps
        stored = [*(each for each in stored if each[0] < step), (step, course, order)]
        for k in range(FARTHEST):
            assert order.locate(k) == simulation.order[k], k
        taken = Counter(name for name, _ in simulation.order[:FARTHEST])
        for name in NAMES:
            assert [own for each, own in simulation.order if each == name] == list(range(taken[name]))
        for k in (0, 1, sample, course.position(step), FARTHEST):
            counted = Counter(name for name, _ in simulation.order[:k])
            assert {name: count for name, count in order.counts(k).items() if count} == counted
        assert Stages.model_validate_json(order.model_dump_json()) == order
        trained = [simulation.order[k] for s in range(1, step + 1) for k in samples(course, s)]
        assert len(trained) == len(set(trained)), "nothing is trained on twice"
        lost = set(simulation.order[: course.position(step)]) - set(trained)
        assert lost == {simulation.order[k] for k in range(course.position(step)) if k in course.windows}


def samples(course: Course, step: int) -> list[int]:
    return [k for piece in course.samples(step) for k in piece]


def test_a_source_that_comes_back_goes_on_where_it_was() -> None:
    order = Stages.begin(STREAMS, stages((0, {"a": 1, "b": 1}), (10, {"a": 1}), (15, {"b": 1, "c": 3})))
    assert order.counts(10) == {"a": 5, "b": 5} and order.counts(15) == {"a": 10, "b": 5}
    assert [order.locate(k) for k in range(10, 16)] == [*(("a", own) for own in range(5, 10)), ("c", 0)]
    assert order.locate(16) == ("b", 5) and order.counts(23) == {"a": 10, "b": 7, "c": 6}


def test_one_stage_is_the_blend_as_it_always_was(stream: Callable[..., Path]) -> None:
    a, b = stream(41, "a"), stream(81, "b")
    plain = open_dataset({str(a): 0.3, str(b): 0.7}, 4, seed=2)
    staged = open_dataset(None, 4, 2, [(0, {str(a): 0.3, str(b): 0.7}), (50, {str(a): 3, str(b): 7})])
    assert isinstance(staged, Blend) and len(staged.stages.stages) == 1, "the same blend in other units"
    assert all((plain.sample(k) == staged.sample(k)).all() for k in range(200))


def test_documents_are_read_in_the_order_of_their_source(stream: Callable[..., Path]) -> None:
    """Real datasets, through a change of stage and a resume that removes a source, adds one and takes one back."""
    paths = {name: str(stream(tokens, name)) for name, tokens in (("a", 41), ("b", 81), ("c", 61))}
    opened = {name: open_source(name, path, 4, 7) for name, path in paths.items()}
    streams = {name: stream_of(paths[name], each) for name, each in opened.items()}
    order = Stages.begin({name: streams[name] for name in "ab"}, stages((0, {"a": 1, "b": 2}), (20, {"b": 1})))
    order = order.resumed(33, {name: streams[name] for name in "bc"}, stages((0, {"b": 1, "c": 1})))
    order = order.resumed(50, streams, stages((0, {"a": 2, "c": 1})))
    mixed, read = Blend(opened, order), {name: [] for name in paths}
    for k in range(90):
        read[order.locate(k)[0]].append(mixed.sample(k).tolist())
    for name, path in paths.items():
        alone = TokenDataset(path, 4, 7)
        assert read[name] == [alone.sample(k).tolist() for k in range(len(read[name]))]
    assert sum(map(len, read.values())) == 90 and min(map(len, read.values())) > 10


def test_the_change_stays_where_it_was_made_when_the_run_goes_back() -> None:
    order = Stages.begin(STREAMS, stages((0, {"a": 1}))).resumed(80, STREAMS, stages((0, {"b": 1})))
    assert order.resumed(60, STREAMS, stages((0, {"b": 1}))) == order
    assert order.resumed(60, STREAMS, stages((0, {"b": 7}))).stages == order.stages, "in other units"
    assert [each.sample for each in order.resumed(60, STREAMS, stages((0, {"c": 1}))).stages] == [0, 60]


def test_windows_ahead_are_of_the_order_before() -> None:
    """What the guard skips is skipped; a change of the blend begins behind it."""
    course = Course.begin(10).resumed(4, 10, [], SkipWindows([(40, 60), (75, 80)]))
    assert course.open(4, SkipWindows([(40, 60), (75, 80)])) == 80
    assert course.open(4, SkipWindows()) == 60, "a window of the configuration is of no order"
    assert course.open(3, SkipWindows()) == 30 and course.open(9, SkipWindows([(40, 60)])) == course.position(9)


def test_a_source_is_known_again_at_another_place() -> None:
    order = Stages.begin({"/old/web": Stream(paths="/old/web", tokens=9, documents=1)}, stages((0, {"/old/web": 1})))
    moved = {"/new/web": Stream(paths="/new/web", tokens=9, documents=1)}
    there = order.resumed(5, moved, stages((0, {"/new/web": 1})))
    assert there.stages == stages((0, {"/new/web": 1})) and there.locate(7) == ("/new/web", 7)
    assert there.streams == moved
    other = {"/new/web": Stream(paths="/new/web", tokens=10, documents=1)}
    begun = order.resumed(5, other, stages((0, {"/new/web": 1})))
    assert begun.locate(7) == ("/new/web", 2), "another one, from its first sample on"


def test_another_name_for_the_same_files_changes_nothing() -> None:
    order = Stages.begin({"web": STREAMS["a"]}, stages((0, {"web": 1})))
    renamed = order.resumed(5, {"pages": STREAMS["a"]}, stages((0, {"pages": 1})))
    assert renamed.locate(7) == ("pages", 7) and len(renamed.stages) == 1


def test_what_is_read_again_under_another_name_is_known() -> None:
    """A list that has grown is a source of its own, as is each of its parts."""
    web, code = ("data/web", "data/code"), ("data/web", "data/code", "data/math")
    order = Stages.begin(
        {"web and 1 more": Stream(paths=web, tokens=9, documents=1)}, stages((0, {"web and 1 more": 1}))
    )
    grown = {"web and 2 more": Stream(paths=code, tokens=12, documents=1)}
    now = order.resumed(5, grown, stages((0, {"web and 2 more": 1})))
    assert now.locate(5) == ("web and 2 more", 0) and now.come_again(5) == {"web and 2 more": "web and 1 more"}
    alone = {"data/math": Stream(paths="data/math", tokens=3, documents=1)}
    assert order.resumed(5, alone, stages((0, {"data/math": 1}))).come_again(5) == {}
    assert order.come_again(5) == {}


@pytest.mark.parametrize(
    "wanted, names, message",
    [
        (
            stages((0, {"a": 1}), (90, {"e": 1})),
            "abcd",
            "sample 90 on there is a part of 'e', which .* does not name; ",
        ),
        (stages((0, {"d": 1}), (90, {"a": 1})), "abc", "sample 50 on there is a part of 'd', which .* any more; .*put"),
        (stages((0, {"a": 1}), (90, {"d": 1})), "abc", "sample 90 on there is a part of 'd', which .* any more; .*put"),
    ],
)
def test_unknown_and_removed_sources(wanted: tuple[Stage, ...], names: str, message: str) -> None:
    order = Stages.begin(STREAMS, stages((0, {"d": 1})))
    with pytest.raises(ConfigError, match=message) as caught:
        order.resumed(50, {name: STREAMS[name] for name in names}, wanted)
    assert caught.value.exit_code == 2


def test_a_stage_that_is_over_may_name_what_was_removed() -> None:
    wanted = stages((0, {"d": 1}), (40, {"a": 1}))
    order = Stages.begin(STREAMS, wanted)
    assert order.resumed(40, {name: STREAMS[name] for name in "abc"}, wanted).stages == order.stages
    with pytest.raises(ConfigError, match="sample 39 on there is a part of 'd'"):
        order.resumed(39, {name: STREAMS[name] for name in "abc"}, wanted)


def test_a_source_that_holds_something_else() -> None:
    order = Stages.begin(STREAMS, stages((0, {"a": 1}), (50, {"b": 1})))
    grown = {**STREAMS, "a": Stream(paths="data/a", tokens=101, documents=10)}
    with pytest.raises(DataError, match=r"source a holds 101 tokens in 10 documents, and held 100 in 10") as caught:
        order.resumed(40, grown, order.configured)
    assert caught.value.exit_code == 5
    over = order.resumed(50, grown, order.configured)
    assert over.streams == STREAMS, "it is over, but not forgotten"
    with pytest.raises(DataError, match="source a holds 101 tokens"):
        over.resumed(40, grown, order.configured)
    late = {**STREAMS, "b": Stream(paths="data/b", tokens=101, documents=10)}
    assert order.resumed(40, late, order.configured).streams == late, "it has not been begun"
    with pytest.raises(DataError, match="source a holds 101 tokens"):
        order.resumed(50, grown, stages((0, {"a": 1, "b": 1})))


def test_the_same_time_at_any_sample() -> None:
    """A trillion tokens, 300 sources, 30 stages: no list as long as the data is made."""
    streams = {f"s{i}": Stream(paths=f"s{i}", tokens=10**9, documents=10**6) for i in range(300)}
    blends = [(10**9 * n, {f"s{i}": 1 + (i * n) % 7 for i in range(n % 3, 300)}) for n in range(30)]
    order = Stages.begin(streams, stages(*blends))
    assert sum(order.counts(10**12).values()) == 10**12
    near, far = order.counts(10**12), order.counts(10**12 + 1000)
    found = Counter(order.locate(10**12 + k)[0] for k in range(1000))
    assert {name: far[name] - near[name] for name in far if far[name] > near[name]} == found
