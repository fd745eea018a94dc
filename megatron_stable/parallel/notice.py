"""What rank 0 says of a step that takes long, before the run ends for it. Decisions, by a clock that is given."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from statistics import median
from typing import Literal, NamedTuple

TIMES = 5.0  # the usual duration of a step: longer is worth a word
PACES = 20  # steps of which the median is the usual duration
ENOUGH = 3  # of them
AGAIN, CHANGED = 2.0, 1.25  # times as long as when it was last said: to say it again, or as others are waited for


class Doing(NamedTuple):
    """What a rank's main thread does.

    Attributes:
        number: Of what was done before.
        allowance: Seconds that it may take.
        step: The last one that has begun.
        after: Whether that is over: an evaluation, a checkpoint, or whatever follows.
        since: When it began.
    """

    number: int
    allowance: float
    step: int
    after: bool
    since: float

    def __str__(self) -> str:
        """In words."""
        return f"what follows step {self.step}" if self.after else f"step {self.step}"


class Waiting(NamedTuple):
    """Something takes long.

    Attributes:
        step, after: See :class:`Doing`.
        seconds: For so long by now.
        ranks: Those that the others wait for; empty: none stands out.
        who: The same in words, with their machines.
        again: Whether it was said before.
    """

    step: int
    after: bool
    seconds: float
    ranks: tuple[int, ...]
    who: str
    again: bool


class WentOn(NamedTuple):
    """It went on after all, after so many seconds."""

    step: int
    after: bool
    seconds: float


class Lost(NamedTuple):
    """The run ends.

    Attributes:
        step: The last one that has begun.
        exit_code: Of the rank that is to blame, or of all.
        reason: In words.
        stacks: Where the ranks stand, by ranks.
        rank_0: How it is lost, if it is: others must speak for it then.
    """

    step: int
    exit_code: int
    reason: str
    stacks: dict[str, str]
    rank_0: Literal["gone", "silent"] | None = None


class Suspected(NamedTuple):
    """Nothing has been heard of rank 0 for half the time after which it is lost."""


Word = Waiting | WentOn | Lost | Suspected


class Watch:
    """When to speak of something that takes long.

    A step does so after five times the median of the last ones, but never before ``floor``, and anything at all after
    half of what it may take; so nothing is said of a first step, a checkpoint or an evaluation that are merely slow.
    It is said again at growing intervals, and a little sooner where others are waited for than before.

    Args:
        floor: Seconds that are never too long.
    """

    def __init__(self, floor: float) -> None:
        self.floor = floor
        self._paces = deque[float](maxlen=PACES)
        self._spoken: tuple[Doing, float, tuple[int, ...]] | None = None  # of what, after how long, waiting for whom
        self._took = 0.0  # seconds, what was spoken of

    def done(self, doing: Doing, seconds: float) -> None:
        """Something is over; on the main thread."""
        if not doing.after:
            self._paces.append(seconds)
        if self._spoken is not None and self._spoken[0].number == doing.number:
            self._took = seconds

    def due(self, doing: Doing) -> float:
        """Seconds after which to speak of it."""
        paces = [*self._paces]
        half = doing.allowance / 2
        return half if doing.after or len(paces) < ENOUGH else min(half, max(self.floor, TIMES * median(paces)))

    def see(
        self,
        doing: Doing,
        now: float,
        silent: bool,
        awaited: Callable[[], Sequence[int]],
        name: Callable[[Sequence[int]], str],
    ) -> Waiting | WentOn | None:
        """What to say, if anything.

        Args:
            silent: Whether a rank has been silent for so long that it is worth a word by itself.
            awaited: The ranks that the others wait for.
            name: Them, in words.
        """
        seconds = now - doing.since
        late = silent or seconds > self.due(doing)
        if self._spoken is not None and (self._spoken[0].number != doing.number or not late):
            before, after, _ = self._spoken
            went_on = WentOn(before.step, before.after, max(self._took, after))
            self._spoken, self._took = None, 0.0
            return went_on
        if not late:
            return None
        ranks = tuple(awaited())
        if self._spoken is not None:
            _, said, before_ranks = self._spoken
            if seconds < said * (AGAIN if ranks == before_ranks else CHANGED):
                return None
        again, self._spoken = self._spoken is not None, (doing, seconds, ranks)
        return Waiting(doing.step, doing.after, seconds, ranks, name(ranks), again)


def told(word: Waiting | WentOn) -> str:
    """In one line, for people."""
    what = str(Doing(0, 0.0, word.step, word.after, 0.0))
    if isinstance(word, WentOn):
        return f"{what} went on after {word.seconds:.0f} s"
    whom = f"waiting for {word.who}" if word.ranks else "no rank stands out"
    return f"{what} has taken {word.seconds:.0f} s; {whom}"


class Recorder:
    """Puts words on record, in order, from a thread of its own: the disk may hang.

    Args:
        record: Called with each word.
    """

    def __init__(self, record: Callable[[Word], None]) -> None:
        self._record = record
        self._words = queue.SimpleQueue[Word | threading.Event]()
        threading.Thread(target=self._run, name="lifeline record", daemon=True).start()

    def __call__(self, word: Word) -> None:
        """Returns at once."""
        self._words.put(word)

    def finish(self, seconds: float) -> None:
        """Wait until all that was said is on record, but not for longer than that."""
        done = threading.Event()
        self._words.put(done)
        done.wait(seconds)

    def _run(self) -> None:
        while True:
            word = self._words.get()
            if isinstance(word, threading.Event):
                word.set()
                continue
            with suppress(Exception):  # of a disk that is full, or gone; what comes later is to be tried all the same
                self._record(word)
