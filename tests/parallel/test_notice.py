"""When a step that takes long is spoken of, by a clock of the test's own, and how it is put on record."""

from __future__ import annotations

import threading
import time
from itertools import pairwise

import pytest

from megatron_stable.parallel.notice import Doing, Recorder, Waiting, Watch, WentOn, Word, told

LIMIT, SLOW, FLOOR, BEAT = 45.0, 1800.0, 9.0, 3.0


class Run:
    """A run whose steps take as long as the test says; rank 0 looks every few seconds."""

    def __init__(self, limit: float = LIMIT) -> None:
        self.watch, self.now, self.limit = Watch(FLOOR), 0.0, limit
        self.doing = Doing(0, SLOW, 0, True, 0.0)
        self.awaited: tuple[int, ...] = (5,)
        self.silent = False
        self._looks = 0.0
        self.lines: list[tuple[float, str]] = []
        self.words: list[Word] = []

    def take(self, seconds: float) -> list[str]:
        """Time passes; what is said meanwhile."""
        before, end = len(self.lines), self.now + seconds
        while self._looks + BEAT <= end:
            self._looks += BEAT
            name = ", ".join(f"rank {rank} on node{rank // 2}" for rank in self.awaited)
            word = self.watch.see(self.doing, self._looks, self.silent, lambda: self.awaited, lambda _, name=name: name)
            if word is not None:
                self.lines.append((self._looks, told(word)))
                self.words.append(word)
        self.now = end
        return [line for _, line in self.lines[before:]]

    def go_on(self, after: bool, allowance: float) -> None:
        self.watch.done(self.doing, self.now - self.doing.since)
        step = self.doing.step + (not after)
        self.doing = Doing(self.doing.number + 1, allowance, step, after, self.now)

    def step(self, *seconds: float, allowance: float = 0.0) -> list[str]:
        """A step, in parts; what is said in each is in ``lines``."""
        self.go_on(False, allowance or self.limit)
        said = [line for part in seconds for line in self.take(part)]
        self.go_on(True, self.limit)
        return said


@pytest.fixture
def run() -> Run:
    run = Run()
    assert run.take(600.0) == [], "starting up"
    assert run.step(800.0, allowance=SLOW) == [], "the first step"
    assert [line for _ in range(20) for line in run.step(2.0)] == []
    return run


def test_a_step_that_takes_long_is_said_and_that_it_went_on(run: Run) -> None:
    (waits,) = run.step(17.0)
    assert waits in {f"step 22 has taken {n} s; waiting for rank 5 on node2" for n in range(10, 14)}
    assert run.take(3.0) == ["step 22 went on after 17 s"]
    assert [line for _ in range(9) for line in run.step(2.0)] == []


def test_healthy_steps_are_not_spoken_of_however_slow_they_are() -> None:
    run = Run(1800.0)
    assert [line for seconds in [300.0, 90.0, 90.0, 80.0, 170.0, 200.0] for line in run.step(seconds)] == []
    assert run.step(700.0)[0].startswith("step 7 has taken 65")


@pytest.mark.parametrize("what", ["a checkpoint", "an evaluation"])
def test_what_may_take_long_is_not_spoken_of(run: Run, what: str) -> None:
    if what == "a checkpoint":
        run.go_on(True, SLOW)
        assert run.take(890.0) == []
    else:
        for _ in range(50):
            run.go_on(True, LIMIT)
            assert run.take(20.0) == []


def test_a_rank_that_is_silent_in_a_checkpoint_is_spoken_of_at_once(run: Run) -> None:
    run.go_on(True, SLOW)
    run.take(30.0)
    run.silent = True
    assert run.take(3.0)[0].startswith("what follows step 21 has taken 3")
    run.silent = False
    assert run.take(6.0)[0].startswith("what follows step 21 went on after 3")


def test_a_change_is_said_sooner_than_the_same_again(run: Run) -> None:
    run.go_on(False, LIMIT)
    assert len(run.take(13.0)) == 1
    assert run.take(3.0) == []
    run.awaited = (5, 6)
    (changed,) = run.take(3.0)
    assert changed.endswith("waiting for rank 5 on node2, rank 6 on node3")
    run.awaited = ()
    (nobody,) = run.take(6.0)
    assert nobody.endswith("no rank stands out")


def test_a_step_of_half_an_hour_is_spoken_of_now_and_then() -> None:
    run = Run(1800.0)
    for _ in range(5):
        run.step(2.0)
    lines = run.step(1790.0)
    assert 7 <= len(lines) <= 9
    waits = [word for word in run.words if isinstance(word, Waiting)]
    assert [word.again for word in waits] == [False] + [True] * (len(lines) - 1)
    assert all(later.seconds >= 2 * earlier.seconds for earlier, later in pairwise(waits))
    flickers = Run(1800.0)
    for _ in range(5):
        flickers.step(2.0)
    flickers.go_on(False, 1800.0)
    for second in range(1790):
        flickers.awaited = (second // 3 % 2,)
        flickers.take(1.0)
    assert len(flickers.lines) <= 25


def test_it_is_never_said_for_the_first_time_when_half_of_the_limit_is_over(run: Run) -> None:
    for _ in range(30):
        run.step(20.0)
    run.words.clear()
    run.step(LIMIT - 1)
    (first, *_) = run.words
    assert isinstance(first, Waiting) and first.seconds <= LIMIT / 2 + BEAT


def test_words_are_put_on_record_in_order_and_none_waits_for_a_disk_that_hangs() -> None:
    disk, written = threading.Event(), list[Word]()

    def write(word: Word) -> None:
        disk.wait(20.0)
        written.append(word)
        raise OSError("full")

    record = Recorder(write)
    words = [WentOn(step, False, 1.0) for step in range(3)]
    began = time.monotonic()
    for word in words:
        record(word)
    record.finish(0.2)
    assert time.monotonic() - began < 5.0 and written == []
    disk.set()
    record.finish(20.0)
    assert written == words
