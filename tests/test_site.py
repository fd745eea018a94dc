"""The documentation builds as a site without a warning: no dead link, no page outside the navigation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_site_builds_and_can_be_searched(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {
        entry["location"]: entry["text"]
        for entry in json.loads((tmp_path / "search/search_index.json").read_text())["docs"]
    }
    assert "Megatron-style trainer" in found["index.html"]
    api = (tmp_path / "api.html").read_text()
    assert "megatron_stable.stability.guard.Guard" in api and "Raises:" in api
    assert "fonts.googleapis" not in (tmp_path / "index.html").read_text()  # nothing is fetched from elsewhere
