"""The studies of examples/studies: their pages come from the tables that are committed, and say what these say."""

from __future__ import annotations

import json
import lzma
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
STUDIES, PAGES = ROOT / "examples" / "studies", ROOT / "docs" / "studies"
sys.path.insert(0, str(STUDIES))

import claims  # noqa: E402
import common  # noqa: E402
import wortsman  # noqa: E402

sys.path.remove(str(STUDIES))  # other tests are to find no more modules than there are


@pytest.mark.parametrize("name", ["rybakov", "wortsman"])
def test_page_and_figures_come_from_the_committed_tables(name: str, tmp_path: Path) -> None:
    shutil.copytree(STUDIES, tmp_path / "examples" / "studies")
    shutil.copytree(PAGES, tmp_path / "docs" / "studies", ignore=shutil.ignore_patterns("*.png", "*.md"))
    script = tmp_path / "examples" / "studies" / f"{name}.py"
    done = subprocess.run([sys.executable, script, "--from-tables"], cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0
    page = (tmp_path / "docs" / "studies" / f"{name}.md").read_text(encoding="utf-8")
    assert page == (PAGES / f"{name}.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page)
    assert len(shown) >= 3
    for picture in shown:
        for folder in (tmp_path / "docs" / "studies", PAGES):
            assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_the_largest_size_was_foretold_as_it_is_from_the_table_now() -> None:
    """What was said before it was trained is what --leave-out-largest says, so no later run has had a part in it."""
    made = json.loads((PAGES / "wortsman" / "prediction.json").read_text())["forecasts"]
    study = wortsman.study(PAGES / "wortsman")
    assert len(made) == len(study.tests) == 3
    for before, test in zip(made, study.tests, strict=True):
        assert before["group"] == test.group.where
        assert before["parameters"] == pytest.approx(test.forecast.size, rel=0.001)
        for cell, outcome in zip(before["cells"], test.outcomes, strict=True):
            assert cell["learning_rate"] == outcome.cell.rate
            assert cell["risk"] == pytest.approx(outcome.cell.risk, abs=0.03)
            logit = outcome.cell.values.get("max_logit")
            if logit is not None:
                assert cell["values"]["max_logit"]["median"] == pytest.approx(logit.median, rel=0.02)


def test_verdicts_on_claims() -> None:
    assert claims.beyond((1.2, 1.1, 1.3), 1.0, above=True) == "agrees"
    assert claims.beyond((1.2, 1.1, 1.3), 1.0, above=False) == "disagrees"
    assert claims.beyond((1.2, 0.9, 1.3), 1.0, above=True).startswith("open")
    assert claims.within((0.0, -0.1, 0.1), -0.1, 0.1) == "agrees"
    assert claims.within((0.3, 0.2, 0.4), -0.1, 0.1) == "disagrees"
    assert claims.within((0.1, 0.0, 0.4), -0.1, 0.1).startswith("open")
    assert claims.together(["agrees", "agrees"]) == "agrees"
    assert claims.together(["agrees", "disagrees"]) == "agrees in part"
    assert claims.together(["disagrees", "open: x"]).startswith("open")
    assert claims.paired({1: 3.0, 2: 8.0, 3: 5.0}, {1: 1.0, 2: 2.0, 4: 9.0}) == (4.0, 2.0, 6.0)


def test_a_scaled_study_has_wider_models_and_places_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(common, "TRAINED", tmp_path)
    path = common.scaled("wortsman_largest", 4)
    wide = yaml.safe_load(path.read_text())
    base = yaml.safe_load(Path(wide["base"]).read_text())
    assert wide["directory"] == "runs/studies/wortsman_largest_x4"
    assert wide["axes"]["size"]["largest"] == {"model.layers": 4, "model.hidden": 512, "model.heads": 8}
    assert (base["model"]["hidden"], base["model"]["sequence_length"], base["model"]["heads"]) == (256, 256, 4)
    assert common.scaled("wortsman_largest", 1) == STUDIES / "wortsman_largest.yaml"


def test_every_text_is_there() -> None:
    lines = lzma.decompress((STUDIES / "moby_dick.jsonl.xz").read_bytes()).decode().splitlines()
    assert len(lines) == 136
    assert json.loads(lines[0])["text"].startswith("CHAPTER 1. Loomings.\n\nCall me Ishmael.")
