"""Known-bad versions, unmet requirements and PyPI's apex are found; what is said of optional packages is true."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_stable.doctor.finding import Verdict
from megatron_stable.doctor.optional import check_optional
from megatron_stable.doctor.versions import KNOWN_BAD, KnownBad, check_versions, known_bad
from megatron_stable.model import flash

PACKAGE = Path(__file__).parents[2] / "megatron_stable"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages that comes before all others."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def install(site: Path, name: str, version: str) -> None:
    """Leave a distribution's metadata as pip does."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_what_is_installed_here_is_good() -> None:
    assert [finding.verdict for finding in check_versions()] == [Verdict.OK]


@pytest.mark.parametrize("bad", KNOWN_BAD, ids=lambda bad: f"{bad.package}-{bad.first}")
def test_a_version_is_bad_from_its_first_and_before_it_was_mended(bad: KnownBad) -> None:
    (found,) = [each for each in known_bad({bad.package: bad.first}) if bad.source in each.text]
    assert found.verdict is Verdict.FAILURE
    assert bad.wrong in found.text and bad.mended in found.remedy
    assert not [each for each in known_bad({bad.package: bad.mended}) if bad.source in each.text]


def test_an_installed_version_that_is_bad_is_found(site: Path) -> None:
    install(site, "deepspeed", "0.19.1")
    told, bad, unmet = check_versions()
    assert "deepspeed 0.19.1" in told.text
    assert bad.text.startswith("deepspeed 0.19.1 is known to be wrong: under a pipeline, gradients are divided")
    assert unmet.text.startswith("deepspeed is 0.19.1; the tests have seen deepspeed<0.20,>=0.19.8")
    assert bad.verdict is unmet.verdict is Verdict.FAILURE


@pytest.mark.skipif(find_spec("apex") is not None, reason="an apex is installed")
def test_apex_of_pypi_is_told_from_nvidias(site: Path) -> None:
    package = site / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    install(site, "apex", "0.9.10.dev0")
    (wrong,) = [finding for finding in check_optional(None, on_gpu=False) if finding.check == "apex"]
    assert wrong.verdict is Verdict.WARNING and "PyPI's apex is a toolkit" in wrong.text


def imports(path: Path) -> set[str]:
    """Top-level names of what a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_what_is_said_of_optional_packages_is_true() -> None:
    by_file = {path.relative_to(PACKAGE).as_posix(): imports(path) for path in PACKAGE.rglob("*.py")}
    assert not any("liger_kernel" in names for names in by_file.values())
    assert "flash_attn" in flash.VERSIONS and set(flash.VERSIONS) <= {"flash_attn", "flash_attn_interface"}
