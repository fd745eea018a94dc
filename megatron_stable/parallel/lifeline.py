"""No rank waits for ever for one that is lost: the run ends everywhere, with the name of the rank and its machine.

- A rank that dies is missed at once by the one before it, whose connection breaks; the word goes round the ring.
- A rank that falls silent, as its machine lost power or its network, or its process was stopped: each rank's thread
  leaves a beat in the store of the process group every few seconds and reads rank 0's word there; rank 0 reads all
  beats at once. So each rank makes two requests per interval, however many ranks there are.
- A rank that gets nothing done while its thread beats (a loop, a hung GPU): rank 0 asks all for their stacks.
- Long before, rank 0 says which step takes long, and whom the others wait for.
- A rank that cannot reach the store, or hears no word from rank 0 there, ends itself.
- A process whose threads cannot run, as it was stopped or an extension holds the GIL, is ended by a timer in C.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Literal, NoReturn, TypeVar

import torch.distributed as dist

from megatron_stable.parallel.heartbeat import ANEW, END, LEFT, STACKS, Beat, Judge, Verdict, stack_of
from megatron_stable.parallel.notice import Doing, Lost, Recorder, Suspected, Waiting, Watch, Word, told
from megatron_stable.parallel.ring import MEETING, Ring
from megatron_stable.parallel.world import first_to_crash, key_value_store

T = TypeVar("T")
SLOW = 1800.0  # seconds that starting up may take, or reading or writing a whole checkpoint
LEAVES, STOPS, CRASHES = 0, 1, 255  # words on the ring; to the second, the exit code is added
FOLLOWS = 1.5  # seconds before following a crashed rank, whose exit code is the one that the launcher should see
TELLS = 4.0  # seconds in which a crashed rank tells why; less than a connection that is lost is waited for
GOES_ROUND = 0.5  # seconds in which a word does
RECORDS = 2.0  # seconds more for putting the end on record: the disk may be slow
WORD = "lifeline/word"  # of rank 0: a count that rises while it lives, and what to do
WHY = "lifeline/why"  # the run ends, as the first to know has it: [reason, exit code]
UNBEGUN = "stopped before training began"
UNTOLD = "a rank was lost, or crashed; what its machine printed says more"


class Lifeline:
    """Ends this process when a rank is lost, even while it waits for that rank in a collective.

    A world of one has nobody to wait for, and nothing of this. Collective; on the main thread.

    Args:
        patience: Seconds after which the run has ended on all ranks if one falls silent, or gets nothing done.
            Starting up may take longer (``SLOW``).
        record: Called from a thread, on rank 0 with what should be kept of what is said here, and on the last rank
            with the loss of rank 0; may raise OSError. Words that are said again are not kept.
        again: What the same command does after such an end, in words.

    Attributes:
        limit: Seconds that a rank may stay silent, or get nothing done: less, by what it takes to say so everywhere.
    """

    def __init__(self, patience: float, record: Callable[[Word], None] = lambda word: None, again: str = ANEW) -> None:
        self.size, self.rank, self.patience = dist.get_world_size(), dist.get_rank(), patience
        self.interval = min(5.0, patience / 20)
        self._answer = max(3 * self.interval, 2.0)  # seconds in which ranks tell where they are
        self._ends = self._answer + 2 * self.interval + FOLLOWS + RECORDS  # seconds that it takes to end everywhere
        self.limit = max(patience / 2, patience - self._ends)
        self._again = again
        self._doing = Doing(0, max(self.limit, SLOW), 0, True, time.monotonic())
        self._watch = Watch(3 * self.interval)
        self._met = time.monotonic()  # when all ranks last did something together
        self._armed = self._met
        self._ring: Ring | None = None
        if self.size == 1:
            return
        self._main = threading.get_ident()
        # a connection of its own: the main thread may hold the other one while it waits for a key
        self._store = key_value_store().clone()
        self._store.set_timeout(timedelta(seconds=MEETING))
        self._crashed = False  # by its main thread
        self._recorder = Recorder(record)
        self._last_word, self._suspected = threading.Lock(), False
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
        self._judge = Judge(self.size, self.limit, self._answer, self._heard, again)
        self._listener = threading.Thread(target=self._listen, name="lifeline ring", daemon=True)
        self._heart = threading.Thread(target=self._live, name="lifeline heart", daemon=True)
        self._listener.start()
        self._heart.start()

    def progress(self, allowance: float | None = None) -> None:
        """Say that something was done.

        Args:
            allowance: Seconds that what comes next may take; ``None``: the limit.
        """
        self._go_on(allowance=self.limit if allowance is None else allowance)

    def stands_at(self, step: int) -> None:
        """Say which step was the last one."""
        self._go_on(step=step)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """What happens within is a step of all ranks, and may take no longer than the limit, unless it is the first."""
        self._go_on(step=number, after=False)
        yield
        self._met = time.monotonic()
        if self._ring is not None and self._met - self._armed > 2 * self.interval and not self._ending.locked():
            self._arm()  # the heart waits for the store, and all is well
        self._go_on(after=True, allowance=self.limit)

    @contextmanager
    def slow(self) -> Iterator[None]:
        """What happens within may take long: a checkpoint that is written or read."""
        before = self._doing.allowance
        self.progress(max(before, SLOW))
        yield
        self.progress(before)

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items, with progress whenever the next one is wanted."""
        for item in items:
            self.progress()
            yield item

    def crash(self, reason: str = "", code: int = 1) -> None:
        """Take the other ranks along: they end soon. Does not return if the run is being ended already.

        Args:
            reason: What happened, in words; empty: another rank is to blame.
            code: With which this process will exit.
        """
        if self._ring is not None:
            if self._ending.locked():
                _sleep_on()
            self._crashed = True
            self._ring.say(CRASHES)
        if reason:
            reason = f"rank {self.rank} on {socket.gethostname()}: {reason}"
            if self._ring is not None:
                self._leave_why(reason, code)
            if self.rank == 0:
                self._keep(Lost(self._doing.step, code, reason, {}))
                self._recorder.finish(RECORDS)

    def stop(self, why: str, code: int = 0) -> NoReturn:
        """End the run, all ranks with this code, as somebody wishes before there is anything to save."""
        if self._ring is not None:
            self._leave_why(why, code)
            self._stop(code)
        _tell(f"{why}: {UNBEGUN}")
        os._exit(code)

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
                reason = f"rank {self._ring.next} on {self._ring.next_host} was lost"
                self._leave_why(f"{reason}; {self._again}", 1)
                lost = self._loss_of_rank_0("gone", reason) if self._ring.next == 0 else None
                self._end(f"error: {reason}; stopping" if first_to_crash() else "", CRASHES, 1, FOLLOWS, lost)
            if word == LEAVES:
                return
            if word == CRASHES:  # this rank's own, perhaps, that has gone round
                self._end("", CRASHES, 1, TELLS if self._crashed else FOLLOWS)
            self._stop(word - STOPS)

    def _live(self) -> None:
        """Beat."""
        last = time.monotonic()
        while True:
            if (stood := time.monotonic() - max(last, self._met)) > self.limit:
                reason = f"rank {self.rank} on {socket.gethostname()} stood still for {stood:.0f} s"
                lost = Lost(self._doing.step, 1, f"{reason}; {self._again}", {}) if self.rank == 0 else None
                self._end(f"error: {reason}; stopping", CRASHES, 1, FOLLOWS, lost)
            last = time.monotonic()
            if not self._ending.locked():
                self._arm()
            try:
                self._round()
            except dist.DistError:
                if time.monotonic() - self._met > self.limit:
                    return  # the store went down: the ring knows why, or rank 0 will not be heard of any more
            if self._left.wait(self.interval):
                with suppress(dist.DistError):
                    self._store.set(self._keys[self.rank], Beat(LEFT, 0, 0.0).encode())
                return

    def _arm(self) -> None:
        """Have a timer in C end this process if it does nothing any more; later than all others would."""
        self._armed = time.monotonic()
        _end_after(self.limit + self._ends)

    def _round(self) -> None:
        """Beat once, and do what rank 0 says."""
        self._count += 1
        self._store.set(self._keys[self.rank], self._beat(asked=self._said.endswith(STACKS)).encode())
        if self.rank == 0:
            beats = [Beat.decode(sent) for sent in self._store.multi_get(self._keys)]
            word = self._judge.see(time.monotonic(), beats, self._met)
            self._store.set(WORD, f"{self._count} {word}")
            if word == END:
                # others read the word before the store goes down with this process
                assert self._ring is not None
                verdict = self._judge.verdict(self._ring.host)
                lost = Lost(self._doing.step, 1, f"{verdict.reason}; {verdict.remedy}", verdict.stacks)
                self._end(_in_full(verdict), CRASHES, 1, FOLLOWS + 2 * self.interval, lost)
            self._notice()
        said = self._store.get(WORD).decode()
        if said != self._said:
            self._said, self._heard, self._suspected = said, time.monotonic(), False
        if said.endswith(END):
            self._end("", CRASHES, 1, FOLLOWS)

    def _notice(self) -> None:
        """On rank 0: say what takes long."""
        judge, ring = self._judge, self._ring
        assert ring is not None
        word = self._watch.see(
            self._doing,
            time.monotonic(),
            judge.silent(self.limit / 2),
            judge.awaited,
            lambda ranks: judge.named(ranks, ring.host),
        )
        if word is not None and not self._ending.locked():
            threading.Thread(target=_tell, args=(told(word),), daemon=True).start()
            self._keep(word)

    def _go_on(self, **changes: Any) -> None:
        before, now = self._doing, time.monotonic()
        self._watch.done(before, now - before.since)
        self._doing = before._replace(number=before.number + 1, since=now, **changes)

    def _beat(self, asked: bool) -> Beat:
        stack, waits, place = stack_of(sys._current_frames()[self._main])
        return Beat(self._count, self._doing.number, self._doing.allowance, stack if asked else "", waits, place)

    def _see_to_rank_0(self) -> None:
        """End this process where nothing has been heard of rank 0."""
        assert self._ring is not None
        # others leave the word to the first, and the record to the last, whose own end would silence the first
        turn = 0 if self._ring.first_here else 2 if self.rank == self.size - 1 else 4
        limit = self.limit + turn * self.interval
        if (quiet := time.monotonic() - max(self._heard, self._met)) > limit:
            stack = stack_of(sys._current_frames()[self._main])[0].rstrip()
            where, name = self._ring.first_host, f"rank {self.rank}"
            reason = f"no word from rank 0 on {where} for {quiet:.0f} s (it is down, cut off, or was stopped)"
            text = f"error: {reason}; stopping\n{name}:\n{stack}"
            lost = self._loss_of_rank_0("silent", f"{reason}; see to that machine", {name: stack})
            self._end(text if self._ring.first_here else "", CRASHES, 1, FOLLOWS, lost)
        if quiet > self.limit / 2 and self.rank == self.size - 1 and not self._suspected:
            self._suspected = True
            self._recorder(Suspected())

    def _loss_of_rank_0(
        self, how: Literal["gone", "silent"], reason: str, stacks: dict[str, str] | None = None
    ) -> Lost | None:
        """What the last rank puts on record: just one does, and it is most often on another machine."""
        if self.rank != self.size - 1:
            return None
        return Lost(self._doing.step, 1, f"{reason}; {self._again}", stacks or {}, rank_0=how)

    def _leave_why(self, reason: str, code: int) -> None:
        """Tell rank 0 why the run ends, through the store, if it answers."""

        def leave() -> None:
            with suppress(dist.DistError):
                self._store.compare_set(WHY, "", json.dumps([reason, code]))

        thread = threading.Thread(target=leave, name="lifeline why", daemon=True)
        thread.start()
        thread.join(GOES_ROUND)

    def _why(self, seconds: float) -> tuple[str, int]:
        """On rank 0: why the run ends, and with which code, when that is known."""
        until = time.monotonic() + seconds
        with suppress(dist.DistError):
            while time.monotonic() < until:
                if self._store.check([WHY]):
                    reason, code = json.loads(self._store.get(WHY))
                    return reason, code
                time.sleep(0.05)
        return UNTOLD, 1

    def _stop(self, code: int) -> NoReturn:
        self._end("" if self.rank else f"{self._why(GOES_ROUND)[0]}: {UNBEGUN}", STOPS + code, code, GOES_ROUND)

    def _end(self, text: str, word: int, code: int, delay: float, lost: Lost | None = None) -> NoReturn:
        """End this process, and with it the run; the first to call it has the reason.

        Args:
            lost: To be put on record; ``None``: rank 0 looks for what another rank has left.
        """
        assert self._ring is not None
        if self._ending.acquire(blocking=False):
            began = time.monotonic()
            _end_after(delay + RECORDS + 10.0)  # whatever holds this thread up
            self._ring.say(word)
            if text:  # from a thread of its own: whoever reads stderr may have stopped reading
                threading.Thread(target=_tell, args=(text,), daemon=True).start()
            if lost is None and self.rank == 0 and word == CRASHES:
                reason, blamed = self._why(delay)
                lost = Lost(self._doing.step, blamed, reason, {})
            if lost is not None:
                self._keep(lost)
            self._recorder.finish(RECORDS)
            time.sleep(max(0.0, began + delay - time.monotonic()))
            os._exit(code)
        _sleep_on()

    def _keep(self, word: Word) -> None:
        """Have a word put on record, but for a second one of the same."""
        again = word.again if isinstance(word, Waiting) else False
        if not again and not (isinstance(word, Lost) and not self._last_word.acquire(blocking=False)):
            self._recorder(word)


def _in_full(verdict: Verdict) -> str:
    stacks = [f"{ranks}:\n{stack}" for ranks, stack in verdict.stacks.items()]
    return "\n".join([f"error: {verdict.reason}; stopping: {verdict.remedy}", *stacks])


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
