"""Rank 0's judgement on the beats of all, by a clock of the test's own."""

from __future__ import annotations

import sys

import pytest

from megatron_stable.parallel.heartbeat import END, GO, LEFT, STACKS, Beat, Judge, spans, stack_of

LIMIT, ANSWER = 100.0, 15.0


def host(rank: int) -> str:
    return f"node{rank // 2}"


class Run:
    """Four ranks that beat and make progress each second, but for those that are told not to."""

    def __init__(self) -> None:
        self.judge, self.now = Judge(4, LIMIT, ANSWER, 0.0), 0.0
        self.beats = [Beat(0, 0, LIMIT)] * 4
        self.silent: set[int] = set()
        self.still: set[int] = set()

    def second(self, word: str = GO) -> str:
        """One more, after rank 0 said ``word``."""
        self.now += 1.0
        for rank, beat in enumerate(self.beats):
            if rank not in self.silent and beat.number != LEFT:
                stack = (f"stack {rank in self.still}", rank not in self.still) if word == STACKS else ("", False)
                moved = 0 if self.still | self.silent else 1  # the others wait for these
                self.beats[rank] = Beat(beat.number + 1, beat.progress + moved, beat.allowance, *stack)
        return self.judge.see(self.now, self.beats)

    def until_the_end(self) -> tuple[float, str]:
        """(seconds, verdict)."""
        began, word = self.now, GO
        while (word := self.second(word)) != END:
            assert self.now - began < 2 * LIMIT, "it never ends"
        return self.now - began, self.judge.verdict(host)


@pytest.fixture
def run() -> Run:
    run = Run()
    assert {run.second() for _ in range(1000)} == {GO}
    return run


def test_a_rank_without_a_beat_is_named_with_its_host_and_where_the_others_are(run: Run) -> None:
    run.silent = {2}
    seconds, verdict = run.until_the_end()
    assert LIMIT < seconds < LIMIT + ANSWER + 3
    first, *rest = verdict.splitlines()
    assert first == "error: rank 2 on node1 fell silent 100 s ago (down, cut off, or stopped); stopping"
    assert rest == ["ranks 0-1, 3:", "stack False"]


def test_silence_is_noticed_while_something_slow_goes_on(run: Run) -> None:
    run.beats = [beat._replace(allowance=10 * LIMIT) for beat in run.beats]
    run.silent = {0, 1}
    seconds, verdict = run.until_the_end()
    assert LIMIT < seconds < LIMIT + ANSWER + 3
    assert verdict.startswith("error: rank 0 on node0, rank 1 on node0 fell silent 100 s ago")


def test_a_rank_that_stands_still_is_told_from_those_that_wait_for_it(run: Run) -> None:
    run.still = {1}
    seconds, verdict = run.until_the_end()
    assert LIMIT < seconds < LIMIT + 4  # all answer at once
    first, *rest = verdict.splitlines()
    assert first.startswith("error: no progress for 10") and "rank 1 on node0, for whom others wait" in first
    assert rest == ["ranks 0, 2-3:", "stack False", "rank 1:", "stack True"]


def test_none_is_blamed_where_all_are_in_the_same_place(run: Run) -> None:
    run.still = {0, 1, 2, 3}
    assert "no rank stands out" in run.until_the_end()[1].splitlines()[0]


def test_what_is_announced_may_take_longer(run: Run) -> None:
    run.beats = [beat._replace(allowance=10 * LIMIT) for beat in run.beats]
    run.still = {1}
    assert {run.second() for _ in range(int(9 * LIMIT))} == {GO}
    assert run.until_the_end()[0] < 2 * LIMIT


def test_a_rank_that_goes_on_after_all_is_forgiven(run: Run) -> None:
    run.still = {1}
    words = [run.second() for _ in range(int(LIMIT) + 1)]
    assert words[-1] == STACKS and {*words[:-1]} == {GO}
    run.still = set()
    assert {run.second(STACKS) for _ in range(10)} == {GO}
    run.still = {1}
    assert run.until_the_end()[0] > LIMIT


def test_a_rank_that_has_left_is_not_missed(run: Run) -> None:
    run.beats[3] = Beat(LEFT, 0, 0.0)
    assert {run.second() for _ in range(1000)} == {GO}
    run.beats[:3] = [Beat(LEFT, 0, 0.0)] * 3
    assert run.second() == GO


def test_a_beat_arrives_as_it_was_sent() -> None:
    beat = Beat(3, 7, 2.5, "a stack\nof two lines", True)
    assert Beat.decode(beat.encode().encode()) == beat


def test_a_stack_is_of_the_innermost_frames_and_does_not_wait_here() -> None:
    text, waits = stack_of(sys._getframe())
    assert "test_a_stack_is_of_the_innermost_frames" in text.splitlines()[-1] and not waits


@pytest.mark.parametrize(
    ("ranks", "words"), [([4], "rank 4"), ([0, 1, 2, 5], "ranks 0-2, 5"), ([*range(1024)], "ranks 0-1023")]
)
def test_ranks_in_words(ranks: list[int], words: str) -> None:
    assert spans(ranks) == words
