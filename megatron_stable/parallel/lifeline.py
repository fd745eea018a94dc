"""No rank waits for ever for one that is lost: the run ends everywhere, with the name of the rank and its machine.

- A rank that dies is missed at once by the one before it, whose connection breaks; the word goes round the ring.
- A rank that falls silent, as its machine lost power or its network, or its process was stopped: each rank's thread
  leaves a beat in the store of the process group every few seconds and reads rank 0's word there; rank 0 reads all
  beats at once. So each rank makes two requests per interval, however many ranks there are.
- A rank that gets nothing done while its thread beats (a loop, a hung GPU): rank 0 asks all for their stacks.
- A rank that cannot reach the store, or hears no word from rank 0 there, ends itself.
- A process whose threads cannot run, as it was stopped or an extension holds the GIL, is ended by a timer in C.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch.distributed as dist

from megatron_stable.parallel.heartbeat import END, LEFT, STACKS, Beat, Judge, stack_of
from megatron_stable.parallel.ring import MEETING, Ring
from megatron_stable.parallel.world import first_to_crash, key_value_store

T = TypeVar("T")
SLOW = 1800.0  # seconds that starting up may take, or reading or writing a whole checkpoint
LEAVES, CRASHES = 0, 255  # words on the ring; between them, the number of the signal that ends the run
FOLLOWS = 1.5  # seconds before following a crashed rank, whose exit code is the one that the launcher should see
TELLS = 4.0  # seconds in which a crashed rank tells why; less than a connection that is lost is waited for
STOPS = 0.5  # seconds in which the word of a signal goes round
WORD = "lifeline/word"  # of rank 0: a count that rises while it lives, and what to do


class Lifeline:
    """Ends this process when a rank is lost, even while it waits for that rank in a collective.

    A world of one has nobody to wait for, and nothing of this. Collective; on the main thread.

    Args:
        patience: Seconds after which the run has ended on all ranks if one falls silent, or gets nothing done.
            Starting up may take longer (``SLOW``).

    Attributes:
        limit: Seconds that a rank may stay silent, or get nothing done: less, by what it takes to say so everywhere.
    """

    def __init__(self, patience: float) -> None:
        self.size, self.rank, self.patience = dist.get_world_size(), dist.get_rank(), patience
        self.interval = min(5.0, patience / 20)
        self._answer = max(3 * self.interval, 2.0)  # seconds in which ranks tell where they are
        self._ends = self._answer + 2 * self.interval + FOLLOWS  # seconds that it takes to end the run everywhere
        self.limit = max(patience / 2, patience - self._ends)
        self._now = (0, max(self.limit, SLOW))  # how much was done, and how long the next may take
        self._ring: Ring | None = None
        if self.size == 1:
            return
        self._main = threading.get_ident()
        # a connection of its own: the main thread may hold the other one while it waits for a key
        self._store = key_value_store().clone()
        self._store.set_timeout(timedelta(seconds=MEETING))
        self._crashed = False  # by its main thread
        self._count, self._said, self._ending, self._left = 0, "", threading.Lock(), threading.Event()
        self._keys = [f"lifeline/beat/{rank}" for rank in range(self.size)]
        self._store.set(self._keys[self.rank], self._beat(asked=False).encode())
        self._ring = Ring(self._store, self.rank, self.size)
        if self.rank == 0:
            self._store.wait(self._keys)
            self._store.set(WORD, "0 go")
        self._store.wait([WORD])
        self._store.set_timeout(timedelta(seconds=patience))
        self._heard = time.monotonic()
        self._judge = Judge(self.size, self.limit, self._answer, self._heard)
        self._listener = threading.Thread(target=self._listen, name="lifeline ring", daemon=True)
        self._heart = threading.Thread(target=self._live, name="lifeline heart", daemon=True)
        self._listener.start()
        self._heart.start()

    def progress(self, allowance: float | None = None) -> None:
        """Say that something was done.

        Args:
            allowance: Seconds that what comes next may take; ``None``: the limit.
        """
        self._now = (self._now[0] + 1, self.limit if allowance is None else allowance)

    @contextmanager
    def slow(self) -> Iterator[None]:
        """What happens within may take long: a checkpoint that is written or read."""
        before = self._now[1]
        self.progress(max(before, SLOW))
        yield
        self.progress(before)

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items, with progress whenever the next one is wanted."""
        for item in items:
            self.progress()
            yield item

    def crash(self) -> None:
        """Take the other ranks along: they end soon. Does not return if the run is being ended already."""
        if self._ring is not None:
            if self._ending.locked():
                _sleep_on()
            self._crashed = True
            self._ring.say(CRASHES)

    def stop(self, number: int) -> NoReturn:
        """End the run, all ranks with code 0, because of a signal that came before there was anything to save."""
        text = f"{signal.Signals(number).name}: stopped before training began"
        if self._ring is not None:
            self._end(text if self.rank == 0 else "", number, 0, STOPS)
        _tell(text)
        os._exit(0)

    def leave(self) -> None:
        """Leave in order. Collective; rank 0, whose store it may be, after all others but the last."""
        if self._ring is None:
            return
        self.progress()
        if self.rank < self.size - 1:
            self._listener.join()
        self._ring.say(LEAVES)
        self._listener.join()
        self._left.set()
        self._heart.join(timeout=5.0)
        faulthandler.cancel_dump_traceback_later()
        self._ring.close()

    def _listen(self) -> None:
        """Wait for the next rank's word."""
        assert self._ring is not None
        while True:
            try:
                word = self._ring.hear(self.interval)
            except TimeoutError:
                self._see_to_rank_0()
                continue
            if word is None:
                self._ring.say(CRASHES)
                text = f"error: rank {self._ring.next} on {self._ring.next_host} was lost; stopping"
                self._end(text if first_to_crash() else "", CRASHES, 1, FOLLOWS)
            if word == LEAVES:
                return
            if word == CRASHES:  # this rank's own, perhaps, that has gone round
                self._end("", CRASHES, 1, TELLS if self._crashed else FOLLOWS)
            self.stop(word)

    def _live(self) -> None:
        """Beat."""
        last = time.monotonic()
        while True:
            if (stood := time.monotonic() - last) > self.limit:
                self._end(f"error: rank {self.rank} stood still for {stood:.0f} s; stopping", CRASHES, 1, FOLLOWS)
            last = time.monotonic()
            if not self._ending.locked():
                _end_after(self.limit + self._ends)  # later than all others
            try:
                self._round()
            except dist.DistError:
                return  # the store went down: the ring knows why, or rank 0 will not be heard of any more
            if self._left.wait(self.interval):
                with suppress(dist.DistError):
                    self._store.set(self._keys[self.rank], Beat(LEFT, 0, 0.0).encode())
                return

    def _round(self) -> None:
        """Beat once, and do what rank 0 says."""
        self._count += 1
        self._store.set(self._keys[self.rank], self._beat(asked=self._said.endswith(STACKS)).encode())
        if self.rank == 0:
            beats = [Beat.decode(sent) for sent in self._store.multi_get(self._keys)]
            word = self._judge.see(time.monotonic(), beats)
            self._store.set(WORD, f"{self._count} {word}")
            if word == END:
                assert self._ring is not None
                # others read the word before the store goes down with this process
                self._end(self._judge.verdict(self._ring.host), CRASHES, 1, FOLLOWS + 2 * self.interval)
        said = self._store.get(WORD).decode()
        if said != self._said:
            self._said, self._heard = said, time.monotonic()
        if said.endswith(END):
            self._end("", CRASHES, 1, FOLLOWS)

    def _beat(self, asked: bool) -> Beat:
        stack = stack_of(sys._current_frames()[self._main]) if asked else ("", False)
        return Beat(self._count, *self._now, *stack)

    def _see_to_rank_0(self) -> None:
        """End this process where nothing has been heard of rank 0."""
        assert self._ring is not None
        # others leave the word to the first
        limit = self.limit if self._ring.first_here else self.limit + 4 * self.interval
        if (quiet := time.monotonic() - self._heard) > limit:
            stack, _ = stack_of(sys._current_frames()[self._main])
            text = (
                f"error: no word from rank 0 on {self._ring.first_host} for {quiet:.0f} s (it is down, cut off, or was "
                f"stopped); stopping\nrank {self.rank}:\n{stack.rstrip()}"
            )
            self._end(text if self._ring.first_here else "", CRASHES, 1, FOLLOWS)

    def _end(self, text: str, word: int, code: int, delay: float) -> NoReturn:
        """End this process, and with it the run; the first to call it has the reason."""
        assert self._ring is not None
        if self._ending.acquire(blocking=False):
            _end_after(delay + 10.0)  # whatever holds this thread up
            self._ring.say(word)
            if text:  # from a thread of its own: whoever reads stderr may have stopped reading
                threading.Thread(target=_tell, args=(text,), daemon=True).start()
            time.sleep(delay)
            os._exit(code)
        _sleep_on()


def _tell(text: str) -> None:
    with suppress(OSError):  # stderr is gone
        print(text, file=sys.stderr, flush=True)


def _end_after(seconds: float) -> None:
    """End this process with its stacks, in place of any earlier such order; a thread in C sees to it."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)


def _sleep_on() -> NoReturn:
    """Wait for the end of this process, which another thread brings about."""
    while True:
        time.sleep(60.0)
