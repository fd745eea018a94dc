"""Fixtures that all tests share."""

import pytest

from tests.harness.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    """Real gloo ranks: ``ranks.run(world_size, function, *args)``."""
    return Ranks()
