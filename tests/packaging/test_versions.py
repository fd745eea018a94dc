"""The versions of Python and torch that are promised are those that CI's matrix has at its ends."""

from __future__ import annotations

import re
from importlib.metadata import metadata, requires
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
MATRIX = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["check"]["strategy"]["matrix"]
PYTHONS = sorted({*MATRIX["python"], *(one["python"] for one in MATRIX["include"])}, key=Version)
TORCHES = sorted({*MATRIX["torch"], *(one["torch"] for one in MATRIX["include"])}, key=Version)
README = (ROOT / "README.md").read_text()


def test_python() -> None:
    named = [
        line.rpartition(" ")[2] for line in metadata("megatron-stable").get_all("Classifier") or () if "3." in line
    ]
    assert named == PYTHONS
    assert metadata("megatron-stable")["Requires-Python"] == f">={PYTHONS[0]}"
    assert f"Python {PYTHONS[0]} to {PYTHONS[-1]};" in README


def test_torch() -> None:
    (torch,) = (one for one in map(Requirement, requires("megatron-stable") or ()) if one.name == "torch")
    first, last = Version(TORCHES[0]), Version(TORCHES[-1])
    assert torch.specifier == f">={first.major}.{first.minor},<{last.major}.{last.minor + 1}"
    assert f"torch {first.major}.{first.minor} to {last.major}.{last.minor};" in README
    pinned = re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None and pinned[1] == TORCHES[-1]
