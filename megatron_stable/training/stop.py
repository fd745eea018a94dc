"""A signal, or the end of who started a run, as a wish to stop: after the step in progress, or before the first one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import NamedTuple

from typing_extensions import Self

from megatron_stable.training.hangup import Starters, drop_dead_streams

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
NAMES = {number.name for number in SIGNALS}
EVERY = 1.0  # seconds between looks for other reasons
NEAR = 20.0  # seconds from a signal to the end of the save; launchers kill after 30


class Wish(NamedTuple):
    """Why a run is to stop.

    Attributes:
        save: Whether it is to save first; ``None``: `checkpoint.on_signal` says.
        forced: It was left alone, which is no success.
    """

    why: str
    save: bool | None = None
    forced: bool = False

    def saves(self, on_signal: bool) -> bool:
        """Whether a run saves first, by its `checkpoint.on_signal`."""
        return on_signal if self.save is None else self.save


@dataclass(frozen=True)
class Stopped:
    """How a signal ended a run.

    Attributes:
        reason: The signal, or what else it was.
        step: The last that was trained.
        saved: The step that the same command goes on from.
        seconds: That saving took.
        since_signal: Seconds from the signal to the end of the save; 0 if there was none.
        forced: It was left alone, which is no success.
    """

    reason: str
    step: int
    saved: int
    seconds: float
    since_signal: float
    forced: bool = False

    def __str__(self) -> str:
        """For the user."""
        if self.saved < self.step:
            left = f"{self.reason}: stopped after step {self.step}, without saving"
            return f"{left}; the same command goes on from step {self.saved}"
        done = f"{self.reason}: stopped after step {self.step}, saved in {self.seconds:.1f} s"
        near = ""
        if self.since_signal > NEAR:
            near = (
                f"warning: the signal came {self.since_signal:.0f} s before the save was complete; many launchers kill "
                "after 30 s: have them wait longer (docs/training.md, Signals)\n"
            )
        return f"{near}{done}; the same command resumes there"


class StopSignal:
    """The signals of this process, and the end of those who started it, within a ``with``.

    Before :meth:`defer` they are acted on at once, whatever the main thread waits for; after it, all ranks learn of
    them with the metrics of a step, whose reduction carries :meth:`wished`.

    Args:
        early: Called, from a thread, with a wish that comes before; ends the process.
        starters: Stop when one of them has ended, or the terminal is closed; ``None``: neither. Nor where SIGHUP is
            ignored already, which is what nohup does.
    """

    def __init__(self, early: Callable[[Wish], None], starters: Starters | None = None) -> None:
        self.received: Wish | None = None
        self.since = 0.0  # when it was received, monotonic
        self._early, self._deferred = early, False
        self._starters = None if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else starters
        self._over = threading.Event()

    def __enter__(self) -> Self:
        mailbox, self._slot = os.pipe()
        os.set_blocking(self._slot, False)
        threading.Thread(target=self._take, args=(mailbox,), name="signals", daemon=True).start()
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        # written to by the handler in C, while Python's waits until the main thread comes back from a collective
        self._slot_before = signal.set_wakeup_fd(self._slot, warn_on_full_buffer=False)
        if starters := self._starters:
            self.watch(lambda: Wish(gone, forced=True) if (gone := starters()) else None)
        else:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(self._slot_before)
        os.close(self._slot)

    def watch(self, look: Callable[[], Wish | None]) -> None:
        """Call ``look`` every second, from a thread, for a reason to stop."""
        threading.Thread(target=self._look, args=(look,), name="watch", daemon=True).start()

    def defer(self) -> None:
        """From now on a signal waits for the end of a step."""
        self._deferred = True

    def wished(self) -> bool:
        """Whether this rank has a reason to stop."""
        return self.received is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._wish(Wish(signal.Signals(number).name))
        if number == signal.SIGHUP:
            drop_dead_streams()

    def _look(self, look: Callable[[], Wish | None]) -> None:
        while not self._over.wait(EVERY):
            if wish := look():
                self._wish(wish)
                if not self._deferred:
                    self._early(wish)
                return

    def _wish(self, wish: Wish) -> None:
        if self.received is None:
            self.received, self.since = wish, time.monotonic()

    def _take(self, mailbox: int) -> None:
        while number := os.read(mailbox, 1):
            if number[0] in SIGNALS and not self._deferred:
                self._early(Wish(signal.Signals(number[0]).name))
        os.close(mailbox)

    def ended(self, wish: Wish, step: int, saved: int, seconds: float) -> Stopped:
        """How the run ended as one rank wished, ``seconds`` after it had stopped."""
        since = time.monotonic() - self.since if self.received and wish.why in NAMES else 0.0
        return Stopped(wish.why, step, saved, seconds, since, wish.forced)
