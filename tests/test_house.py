"""The order of the package, as CONTRIBUTING.md describes it: imports go down, DeepSpeed stays in its room."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import megatron_stable

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_stable"
MODULES = sorted(PACKAGE.rglob("*.py"))
HOUSE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## The house")[2].partition("\n## ")[0]
FLOORS = [*re.findall(r"^\| `(\w+)/` \|", HOUSE, re.M), "ground"]  # from the top
DOOR = {"__init__.py", "__main__.py", "pretrain.py"}  # the entrances may import from any floor
LONGEST = 500  # lines of a file


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of all imports of the package, those in functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "megatron_stable":
            module = node.module or ""
            yield from ((node.lineno, f"{module}.{name.name}") for name in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names if name.name.startswith("megatron_stable"))


def floor(module: str) -> str:
    """Where a module of the package lives; a file beside the rooms is on the ground, below all."""
    room = module.split(".")[1] if "." in module else ""
    return room if (PACKAGE / room).is_dir() else "ground"


def upward(source: str, home: str) -> list[str]:
    """Imports in a file of the floor ``home`` that go up the house."""
    height = FLOORS.index(home)
    found = imported(ast.parse(source))
    return [f"line {line}: {module}" for line, module in found if FLOORS.index(floor(module)) < height]


def deepspeed_objects(source: str) -> list[int]:
    """Lines that take hold of the DeepSpeed object of an engine."""
    nodes = ast.walk(ast.parse(source))
    return [node.lineno for node in nodes if isinstance(node, ast.Attribute) and node.attr == "deepspeed"]


def home(path: Path) -> str:
    return floor(".".join(path.relative_to(ROOT).with_suffix("").parts))


def test_every_room_is_a_floor_of_the_house_in_contributing() -> None:
    assert sorted(FLOORS) == sorted([*(path.parent.name for path in PACKAGE.glob("*/__init__.py")), "ground"])


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if path.relative_to(PACKAGE).as_posix() not in DOOR],
    ids=lambda path: path.relative_to(PACKAGE).as_posix(),
)
def test_no_import_goes_up(path: Path) -> None:
    assert upward(path.read_text(encoding="utf-8"), home(path)) == []


def test_an_import_that_goes_up_is_seen_wherever_it_stands() -> None:
    hidden = "def f():\n    from megatron_stable.training.trainer import Trainer\n    import megatron_stable.errors\n"
    assert upward(hidden, "model") == ["line 2: megatron_stable.training.trainer.Trainer"]
    assert upward(hidden, "commands") == []
    assert upward("from megatron_stable import engine", "model") == ["line 1: megatron_stable.engine"]


@pytest.mark.parametrize("place", ["megatron_stable", "benchmarks", "examples"])
def test_the_deepspeed_object_stays_in_the_engine(place: str) -> None:
    outside = [path for path in sorted((ROOT / place).rglob("*.py")) if PACKAGE / "engine" not in path.parents]
    found = {path.relative_to(ROOT).as_posix(): deepspeed_objects(path.read_text(encoding="utf-8")) for path in outside}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_no_file_is_too_long() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for place in ("megatron_stable", "tests", "benchmarks", "examples", "tools")
        for path in (ROOT / place).rglob("*.py")
    }
    assert {path: length for path, length in lengths.items() if length > LONGEST} == {}


def test_exports_are_what_they_are_whatever_was_imported_before() -> None:
    import_module("megatron_stable.pretrain")
    for name in megatron_stable.__all__:
        assert not isinstance(getattr(megatron_stable, name), ModuleType), name
    assert megatron_stable.train.__module__ == "megatron_stable.training.pretrain"
