from pathlib import Path

import pytest

from tests.training.runs import write_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with a dataset ``data``."""
    write_data(tmp_path / "data")
    return tmp_path
