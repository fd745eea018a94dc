"""Rank 0's judgement on the beats of all, by a clock of the test's own."""

from __future__ import annotations

import sys

import pytest

from megatron_stable.parallel.heartbeat import END, GO, LEFT, STACKS, Beat, Judge, Verdict, spans, stack_of

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

    def second(self, word: str = GO, met: float = 0.0) -> str:
        """One more, after rank 0 said ``word``, and all met at ``met``."""
        self.now += 1.0
        for rank, beat in enumerate(self.beats):
            if rank not in self.silent and beat.number != LEFT:
                stack = f"stack {rank in self.still}" if word == STACKS else ""
                moved = 0 if self.still | self.silent else 1  # the others wait for these
                waits = bool(self.still | self.silent) and rank not in self.still
                place = "all_reduce, c10d.py:9" if waits else "read, loader.py:7"
                self.beats[rank] = Beat(beat.number + 1, beat.progress + moved, beat.allowance, stack, waits, place)
        return self.judge.see(self.now, self.beats, met)

    def until_the_end(self) -> tuple[float, Verdict]:
        """(seconds, verdict)."""
        began, word = self.now, GO
        while (word := self.second(word)) != END:
            assert self.now - began < 2 * LIMIT, "it never ends"
        return self.now - began, self.judge.verdict(host)

    def awaited(self) -> str:
        """In words."""
        return self.judge.named(self.judge.awaited(), host)


@pytest.fixture
def run() -> Run:
    run = Run()
    assert {run.second() for _ in range(1000)} == {GO}
    return run


def test_a_rank_without_a_beat_is_named_with_its_host_and_where_the_others_are(run: Run) -> None:
    run.silent = {2}
    seconds, verdict = run.until_the_end()
    assert LIMIT < seconds < LIMIT + ANSWER + 3
    assert verdict.reason == "rank 2 on node1 fell silent 100 s ago (down, cut off, or stopped)"
    assert verdict.remedy.startswith("see to that machine") and verdict.remedy.endswith("the same command begins anew")
    run.judge.again = "go and see"
    assert run.judge.verdict(lambda rank: "node1").remedy.endswith("; go and see")
    assert verdict.stacks == {"ranks 0-1, 3": "stack False"}


def test_a_rank_without_a_beat_that_still_takes_part_is_not_lost(run: Run) -> None:
    """A link was down: gradients come again, and the connection of the beats has not tried yet."""
    run.silent = {2}
    assert {run.second(met=run.now) for _ in range(3 * int(LIMIT))} == {GO}
    assert not run.judge.silent(ANSWER)
    seconds, verdict = run.until_the_end()
    assert LIMIT - 2 < seconds < LIMIT + ANSWER + 3, "counted from when it last took part"
    assert verdict.reason.startswith("rank 2 on node1 fell silent")


def test_silence_is_noticed_while_something_slow_goes_on(run: Run) -> None:
    run.beats = [beat._replace(allowance=10 * LIMIT) for beat in run.beats]
    run.silent = {0, 1}
    seconds, verdict = run.until_the_end()
    assert LIMIT < seconds < LIMIT + ANSWER + 3
    assert verdict.reason.startswith("rank 0 on node0, rank 1 on node0 fell silent 100 s ago")


def test_a_rank_that_stands_still_is_told_from_those_that_wait_for_it(run: Run) -> None:
    run.still = {1}
    seconds, verdict = run.until_the_end()
    assert LIMIT < seconds < LIMIT + 4  # all answer at once
    assert verdict.reason.startswith("no progress for 10")
    assert verdict.reason.endswith(" s: rank 1 on node0, for whom others wait")
    assert [*verdict.stacks.items()] == [("rank 1", "stack True"), ("ranks 0, 2-3", "stack False")]


def test_none_is_blamed_where_all_are_in_the_same_place(run: Run) -> None:
    run.still = {0, 1, 2, 3}
    assert "no rank stands out" in run.until_the_end()[1].reason


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
    text, waits, place = stack_of(sys._getframe())
    assert "test_a_stack_is_of_the_innermost_frames" in text.splitlines()[-1] and not waits
    line = sys._getframe().f_lineno - 2
    assert place == f"test_a_stack_is_of_the_innermost_frames_and_does_not_wait_here, test_heartbeat.py:{line}"


def test_whom_the_others_wait_for_is_known_within_seconds(run: Run) -> None:
    run.still = {1, 2}
    run.second()
    assert run.awaited() == "rank 1 on node0, rank 2 on node1 (in read, loader.py:7)"
    run.still, run.silent = set(), {3}
    for _ in range(int(ANSWER)):
        run.second()
    assert run.awaited() == f"rank 3 on node1 (silent for {ANSWER:.0f} s)"


def test_on_gpus_where_no_host_waits_it_is_the_one_that_is_elsewhere(run: Run) -> None:
    run.beats = [beat._replace(place="train_step, engine.py:200") for beat in run.beats]
    run.beats[2] = run.beats[2]._replace(place="read, loader.py:7")
    run.judge.see(run.now, run.beats)
    assert run.judge.awaited() == [2]
    run.beats[3] = run.beats[2]
    run.judge.see(run.now, run.beats)
    assert run.judge.awaited() == [], "two here, two there: neither stands out"


def test_where_all_wait_it_is_the_one_that_has_done_the_least(run: Run) -> None:
    run.beats = [beat._replace(waits=True, progress=beat.progress - (rank == 3)) for rank, beat in enumerate(run.beats)]
    run.judge.see(run.now, run.beats)
    assert run.judge.awaited() == [3]


def test_a_thousand_ranks_cost_rank_0_little() -> None:
    """Counted: what is done for a beat grows as the number of ranks, and not faster."""

    def calls(ranks: int) -> int:
        judge, counted = Judge(ranks, LIMIT, ANSWER, 0.0), 0
        beats = [Beat(1, 1, LIMIT, "", rank != 5, f"place {rank % 7}") for rank in range(ranks)]

        def count(frame: object, event: str, argument: object) -> None:
            nonlocal counted
            counted += 1

        sys.setprofile(count)
        try:
            judge.see(1.0, beats)
            judge.silent(LIMIT / 2)
            named = judge.named(judge.awaited(), host)
        finally:
            sys.setprofile(None)
        assert named == "rank 5 on node2 (in place 5)"
        return counted

    assert calls(1024) < 1.2 * 8 * calls(128)
    assert calls(1024) < 30 * 1024


@pytest.mark.parametrize(
    ("ranks", "words"), [([4], "rank 4"), ([0, 1, 2, 5], "ranks 0-2, 5"), ([*range(1024)], "ranks 0-1023")]
)
def test_ranks_in_words(ranks: list[int], words: str) -> None:
    assert spans(ranks) == words
