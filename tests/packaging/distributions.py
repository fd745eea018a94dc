"""What is packed: the files that git holds, built into distributions in a copy of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--quiet"]


def held_by_git() -> set[str]:
    """The checkout's files, those that are not committed yet included; ignored ones are not."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return {name for name in listed if name and (ROOT / name).is_file()}


def copied(names: Iterable[str], folder: Path) -> Path:
    """A copy of these files, in which a build leaves what it likes."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def build_wheel(source: Path, folder: Path) -> Path:
    """The wheel of a folder or of a source distribution."""
    command = [sys.executable, "-m", "pip", "wheel", *BUILD, "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, cwd=folder, env=environment(), check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def build_sdist(source: Path, folder: Path) -> Path:
    """The source distribution of a folder."""
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(folder)]
    subprocess.run(command, cwd=source, env=environment(), capture_output=True, check=True)
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


def packed(distribution: Path) -> set[str]:
    """The files in a wheel or a source distribution, by their paths in the checkout."""
    if distribution.suffix == ".whl":
        with zipfile.ZipFile(distribution) as archive:
            return {name for name in archive.namelist() if ".dist-info/" not in name}
    with tarfile.open(distribution) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    return {name for name in names if ".egg-info/" not in name and name not in {"PKG-INFO", "setup.cfg"}}


def environment() -> dict[str, str]:
    """This process's environment, with nothing in it that leads to the checkout."""
    return {**{key: value for key, value in os.environ.items() if key != "PYTHONPATH"}, "OMP_NUM_THREADS": "1"}
