"""``RUN/interventions.json``: the interventions of a run; see :mod:`megatron_stable.stability.interventions`."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_stable.disk import patiently
from megatron_stable.errors import DataError
from megatron_stable.files import write_file
from megatron_stable.persisted import read_as
from megatron_stable.stability.interventions import Intervention, Interventions

FILE = "interventions.json"


def read_interventions(run: Path) -> Interventions | None:
    """Those of a run's directory; ``None`` if none were ever written there.

    Raises:
        DataError: The file cannot be used.
    """
    path = run / FILE
    if not patiently(path.exists, path):
        return None
    try:
        return Interventions(read_as(tuple[Intervention, ...], path))
    except DataError as error:
        raise DataError(
            f"{error}; restore it from a backup: the newest checkpoint's manifest.json holds a copy under "
            "state.interventions"
        ) from None


def write_interventions(run: Path, interventions: Interventions) -> None:
    """Make these the run's, all or nothing. DataError: they cannot be written."""
    items = [item.model_dump(mode="json") for item in interventions.items]
    write_file(run / FILE, (json.dumps(items, indent=1) + "\n").encode())
