"""What a user installs: the wheel and the source distribution are complete, and work outside the checkout."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
import yaml

from megatron_stable.commands.verbs import VERBS
from tests.packaging.distributions import (
    BUILD,
    ROOT,
    build_sdist,
    build_wheel,
    copied,
    environment,
    held_by_git,
    packed,
)
from tests.training.runs import metrics, settings, write_data

Run = Callable[..., str]


@pytest.fixture(scope="module")
def held() -> set[str]:
    return held_by_git()


@pytest.fixture(scope="module")
def source(held: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(held, tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sdist(source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel alone, and finds the dependencies where these tests have them.

    They are on its path by a .pth file, so that those of the other environment, such as that of an editable
    installation, have no effect.
    """
    folder = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install"]
    subprocess.run([*pip, *BUILD[1:], str(wheel)], env=environment(), check=True)
    return folder


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Run:
    """Run a program of the environment outside the checkout; returns what it prints."""

    def call(program: str, *arguments: str) -> str:
        result = subprocess.run(
            [installed / "bin" / program, *arguments],
            cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout
        return result.stdout

    return call


def package(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith("megatron_stable/")}


def test_wheel_holds_the_package(held: set[str], wheel: Path) -> None:
    assert packed(wheel) == package(held)
    assert "megatron_stable/py.typed" in packed(wheel)


def test_source_distribution_holds_what_git_holds(held: set[str], sdist: Path) -> None:
    assert packed(sdist) == {name for name in held if not name.startswith(".")} | {".dockerignore"}
    assert {"setup.py", "README.md", "CHANGELOG.md", "LICENSE"} <= packed(sdist)


def test_source_distribution_builds_the_same_wheel(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    assert packed(build_wheel(sdist, tmp_path)) == packed(wheel)


def test_an_index_would_take_both(wheel: Path, sdist: Path) -> None:
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr


def test_comparison_names_the_files_of_a_folder_without_init(held: set[str], tmp_path: Path) -> None:
    """As once `megatron_stable/engine/checkpoint/`: eight files that only an editable installation had."""
    (tmp_path / "wheel").mkdir()
    source = copied(held - {"megatron_stable/optim/__init__.py"}, tmp_path / "source")
    found = packed(build_wheel(source, tmp_path / "wheel"))
    assert package(held) - found == {name for name in held if name.startswith("megatron_stable/optim/")} != set()


def test_metadata(installed: Path) -> None:
    (file,) = installed.glob("lib/python*/site-packages/megatron_stable-*.dist-info/METADATA")
    text = file.read_text(encoding="utf-8")
    metadata: Message = message_from_string(text)
    assert (metadata["Name"], metadata["License"]) == ("megatron-stable", "Apache-2.0")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert text.partition("\n\n")[2].strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert not metadata.get_all("Project-URL") and not metadata["Home-page"]
    assert (file.parent / "licenses/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_every_module_imports_from_the_installation(run: Run, held: set[str], installed: Path) -> None:
    files = sorted(name for name in package(held) if name.endswith(".py"))
    modules = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files]
    code = (
        "import importlib, json, sys; "
        "print(json.dumps([importlib.import_module(name).__file__ for name in json.loads(sys.argv[1])]))"
    )
    found = json.loads(run("python", "-c", code, json.dumps(modules)).splitlines()[-1])
    (packages,) = installed.glob("lib/python*/site-packages")
    assert found == [str(packages / name) for name in files]


def test_help_of_each_verb(run: Run) -> None:
    assert "Usage: megatron-stable [OPTIONS] VERB" in run("megatron-stable", "--help")
    code = (
        "import sys; from megatron_stable.commands.app import run_verb; "
        "sys.exit(any(run_verb([verb, '--help']) for verb in sys.argv[1:]))"
    )
    text = run("python", "-c", code, *VERBS)  # one process: most verbs import torch
    for verb in VERBS:
        assert f"Usage: megatron-stable {verb} " in text


def test_pretrain_makes_a_step(run: Run, tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    values = settings(tmp_path, steps=1, schedule={"warmup_steps": 0})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    run("megatron-stable", "pretrain", "--config", "config.yaml")
    (record,) = metrics(tmp_path / "run").values()
    assert record["step"] == 1 and abs(record["loss"] - math.log(61)) < 0.5
