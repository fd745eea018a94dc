from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_stable.errors import DataError
from megatron_stable.records.interventions import FILE, read_interventions, write_interventions
from megatron_stable.stability.interventions import Interventions
from tests.stability.test_interventions import made


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    assert read_interventions(tmp_path) is None
    done = Interventions().add(made("a", 300, (301, 500))).add(made("b", 200, (900, 901), learning_rate_factor=0.5))
    write_interventions(tmp_path, done)
    assert read_interventions(tmp_path) == done


def spoilt(**fields: object) -> bytes:
    """The file of one intervention, with these fields in it."""
    return json.dumps([made("a", 1).model_dump() | fields]).encode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not JSON"),
        (b"{}", "the whole: .* tuple"),
        (b'[{"id": "a"}]', r"0\.by: Field required"),
        (b"\xff", "not JSON"),
        (spoilt(windows=[[5, 3]]), r"0\.windows\.0: skip window \[5, 3\]"),
        (spoilt(windows=[[0, 3]]), r"0\.windows\.0\.0: .*greater than"),
        (spoilt(windows=[[3, 5]]), r"0: .*1 windows of data steps, but 0 of samples"),
        (spoilt(learning_rate_factor=0), r"0\.learning_rate_factor"),
        (spoilt(what=1), r"0\.what: Extra inputs"),
    ],
)
def test_a_file_that_is_none_is_named_with_what_is_wrong(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(DataError, match=f"interventions.json: {said}.*restore it from a backup"):
        read_interventions(tmp_path)
