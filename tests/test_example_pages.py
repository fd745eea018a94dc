"""The examples' plans and their table are what `make examples` writes, and every plan fits."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.test_examples import CONFIGS, EXAMPLES, ranks


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pages", EXAMPLES / "pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pages"] = module
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_plan_that_fits_its_ranks(pages: ModuleType) -> None:
    assert set(pages.NAMES) == {path.stem for path in CONFIGS} == {path.stem for path in EXAMPLES.glob("plans/*.txt")}
    for path in CONFIGS:
        text = (EXAMPLES / "plans" / f"{path.stem}.txt").read_text()
        assert text.startswith(f"$ megatron-stable plan --config examples/{path.name} --ranks {ranks(path)} ")
        assert "\nFITS: " in text


QUICK = {"laptop", "7b"}  # in `make test`


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=[pytest.mark.full] * (path.stem not in QUICK)) for path in CONFIGS]
)
def test_plan_and_row_are_up_to_date(path: Path, pages: ModuleType) -> None:
    assert (EXAMPLES / "plans" / f"{path.stem}.txt").read_text() == pages.text_of(path.stem), "run make examples"
    table = (EXAMPLES / "README.md").read_text().partition(pages.BEGIN)[2].partition(pages.END)[0]
    assert pages.row(path.stem) in table.splitlines(), "run make examples"


@pytest.mark.parametrize(("count", "said"), [(826331136, "826 M"), (10200956928, "10.2 B"), (1.4e12, "1.4 T")])
def test_numbers_are_short(count: float, said: str, pages: ModuleType) -> None:
    assert pages.short(count) == said
    assert pages.short(999_999_668_224) == "1 T"
