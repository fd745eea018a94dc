"""Fixtures that all tests share."""

import os
import signal
from collections.abc import Iterator

# one thread a process: the suite runs many at once, and torch's idle threads spin
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.harness.browser import Browser, browsing
from tests.harness.ranks import Ranks

# what nohup and background jobs ignore, the processes that tests start would ignore, too
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    """Real gloo ranks: ``ranks.run(world_size, function, *args)``."""
    return Ranks()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A real browser: ``with browser.visit(path) as visit``."""
    with browsing() as opened:
        yield opened
