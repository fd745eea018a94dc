"""``RUN/stages.json``: which source each sample of a run comes from; see :mod:`megatron_stable.data.stages`."""

from __future__ import annotations

from pathlib import Path

from megatron_stable.data.stages import Stages
from megatron_stable.disk import patiently
from megatron_stable.errors import DataError
from megatron_stable.files import write_file
from megatron_stable.persisted import read_as

FILE = "stages.json"


def read_stages(run: Path) -> Stages | None:
    """Those of a run's directory; ``None`` if none were ever written there.

    Raises:
        DataError: The file cannot be used.
    """
    path = run / FILE
    if not patiently(path.exists, path):
        return None
    try:
        return read_as(Stages, path)
    except DataError as error:
        raise DataError(
            f"{error}; restore it from a backup: the newest checkpoint's manifest.json holds a copy under state.stages"
        ) from None


def write_stages(run: Path, stages: Stages) -> None:
    """Make these the run's, all or nothing. DataError: they cannot be written."""
    write_file(run / FILE, (stages.model_dump_json(indent=1) + "\n").encode())
