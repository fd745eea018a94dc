"""How far a run is, from the end of its metrics alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_stable.analysis.status import TAIL, _last_record


@pytest.mark.parametrize("size", [10, TAIL, 9 * TAIL])
def test_the_last_record_is_found_however_long_it_is(tmp_path: Path, size: int) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0, "much": "x" * size}) for step in (1, 2)]
    path.write_text("\n".join([*lines, '{"step": 3, "lo']))
    assert _last_record(path)["step"] == 2
    path.write_text("x" * size)
    assert _last_record(path) == {}
