"""Fixtures that all tests share."""

import os

# one thread a process: the suite runs many at once, and torch's idle threads spin
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.harness.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    """Real gloo ranks: ``ranks.run(world_size, function, *args)``."""
    return Ranks()
