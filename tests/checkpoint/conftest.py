import shutil
from pathlib import Path

import pytest

from tests.checkpoint.stored import write_checkpoints
from tests.harness.ranks import Ranks
from tests.training.runs import write_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with a dataset ``data``."""
    write_data(tmp_path / "data")
    return tmp_path


@pytest.fixture(scope="module")
def whole(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 and 2, by two ranks."""
    root = tmp_path_factory.mktemp("whole") / "checkpoints"
    ranks.run(2, write_checkpoints, str(root), [1, 2])
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy of them, to be spoiled."""
    return Path(shutil.copytree(whole, tmp_path / "checkpoints"))
