"""Calls that may never return, and are not waited for longer than so many seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Late(Exception):
    """A call has not returned in time; its thread is left behind."""


def within(seconds: float, work: Callable[[], T]) -> T:
    """What ``work`` returns, in a thread of its own. A file system or name server that hangs holds up that alone.

    Raises:
        Late: It has not returned in time.
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="doctor", daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise Late(f"no answer within {seconds:g} s")
    return done[0]
