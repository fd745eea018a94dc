"""The text that every Python carries."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from megatron_stable.data.standard_library import write_standard_library
from megatron_stable.errors import DataError


def test_text_of_the_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "lib"
    files = {
        "b.py": b"b = 1\n",
        "a.py": "a = 'é'\n".encode(),
        "empty.py": b"",
        "package/__init__.py": b"c = 3\n",
        "latin.py": b"# -*- coding: latin-1 -*-\n'\xe9'\n",
        "package/tests/x.py": b"no",
        "site-packages/y.py": b"no",
        "test/z.py": b"no",
        "notes.txt": b"no",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    assert write_standard_library(tmp_path / "text.jsonl") == (3, 9 + 6 + 6)
    lines = [json.loads(line) for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    assert [line["source"] for line in lines] == ["a.py", "b.py", "package/__init__.py"]
    assert lines[0]["text"] == "a = 'é'\n"
    assert write_standard_library(tmp_path / "text.jsonl", most_bytes=16) == (2, 15)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "nothing")})
    with pytest.raises(DataError, match="carries no source"):
        write_standard_library(tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()
