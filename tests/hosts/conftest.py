"""The two machines, and a folder with data that both see."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import machines, slurm
from tests.training.runs import write_data


@pytest.fixture(scope="session")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[machines.Machines]:
    if reason := machines.lacking():
        pytest.skip(reason)
    with machines.machines(tmp_path_factory.mktemp("machines")) as made:
        yield made


@pytest.fixture
def two(both: machines.Machines) -> Iterator[machines.Machines]:
    """Two machines, and no trace of an earlier test on them."""
    yield both
    both.tidy()


@pytest.fixture(scope="session")
def cluster(both: machines.Machines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Slurm on them; what its commands need in their environment."""
    if reason := slurm.lacking():
        pytest.skip(reason)
    with slurm.cluster(both, tmp_path_factory.mktemp("slurm") / "cluster") as variables:
        yield variables


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with a dataset ``data``."""
    write_data(tmp_path / "data")
    return tmp_path
