"""`megatron-stable forecast`: what it prints, draws, and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_stable.commands.app import run_verb
from tests.study.sweeps import sweep, write


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("commands") / "sweep", *sweep(seeds=1))


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = run_verb(["forecast", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def facts(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    return json.loads(printed(capsys, *arguments, "--json"))


def test_of_a_size(directory: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = printed(capsys, directory, "--parameters", "1e9", "--figures", tmp_path / "pictures")
    for said in (
        "model.recipe=baseline: 1e+09 parameters, from 5 sizes, 1e+06 to 2.56e+08, 35 runs",
        "0.03162 unstable: logits: the largest reaches",
        "likely to diverge; frontier: runs of this size diverge at about",
        "logits: the recipe bounds them",
        "Largest stable learning rate of each size, as measured: 0.1 at 1e+06",
        "Learning rate of the lowest loss: 0.00",
        "Largest safe learning rate: 0.0",
        "What to change: optimizer.learning_rate=",
        "docs/methods/qk_norm.md",
    ):
        assert said in text
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert len(names) == 6 and "model.recipe=baseline_max_logit.png" in names


def test_of_one_learning_rate_of_one_recipe(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = (directory, "--parameters", "1e9", "--learning-rate", "3e-3", "--where", "recipe=qk_norm")
    (made,) = facts(capsys, *target)["forecasts"]
    (cell,) = made["cells"]
    assert (cell["learning_rate"], cell["verdict"], cell["logit_risk"]) == (3e-3, "stable", None)
    assert cell["frontier_risk"] < 0.1 and made["diverges_at"]["low"] == made["largest_safe"] > 3e-3
    assert made["critical_logit"] is None and made["lowest_loss"]["low"] < made["lowest_loss"]["high"]


def test_of_a_configuration(directory: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = {"model": {"layers": 24, "hidden": 1024, "heads": 16, "vocab_size": 32000, "recipe": "qk_norm"}}
    config |= {"optimizer": {"learning_rate": 0.3, "eps": 1e-15}, "loss": {"z_loss": 1e-4}}
    (tmp_path / "big.yaml").write_text(yaml.safe_dump(config))
    (made,) = facts(capsys, directory, "--config", tmp_path / "big.yaml")["forecasts"]
    assert made["group"] == {"model.recipe": "qk_norm"} and made["eps"] == 1e-15
    assert made["parameters"] == pytest.approx(12 * 24 * 1024**2, rel=1e-3)
    assert [(cell["learning_rate"], cell["verdict"]) for cell in made["cells"]] == [(0.3, "unstable")]
    assert made["notes"] == ["the target differs from the runs that it is foretold from: loss.z_loss"]


def test_back_test(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, directory, "--leave-out-largest")
    score = found["score"]
    cells = [cell for test in found["back_tests"] for cell in test["cells"]]
    assert score["cells"] == len(cells) == 14 and score["right"] == sum(cell["right"] for cell in cells) >= 13
    assert score["logits"] == 14 and score["held"] == sum(sum(cell["held"]) for cell in cells) >= 11
    text = printed(capsys, directory, "--leave-out-largest")
    assert f"Stability: {score['right']} of 14" in text
    assert f"Largest attention logit: {score['held']} of 14" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name one target: --parameters N, --config FILE or --leave-out-largest"),
        (("--parameters", "1e9", "--leave-out-largest"), "name one target"),
        (("--leave-out-largest", "--learning-rate", "1e-3"), "leave out --learning-rate"),
        (("--parameters", "-1"), "--parameters -1 is not a positive number"),
        (("--parameters", "nan"), "--parameters nan is not a positive number"),
        (("--parameters", "1e9", "--where", "recipes=qk_norm"), "the sweep has no column recipes"),
        (("--parameters", "1e9", "--where", "recipe=olmo"), "model.recipe is baseline, qk_norm"),
        (("--leave-out-largest", "--where", "steps=7"), "no run has it; steps is 1000"),
        (("--leave-out-largest", "--where", "size=1m"), "has 1 size: without the largest, a forecast needs 3"),
    ],
)
def test_what_is_refused(
    directory: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert run_verb(["forecast", str(directory), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err


def test_no_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(["forecast", str(tmp_path), "--parameters", "1e9"]) == 2
    assert "is no table of a sweep" in capsys.readouterr().err
    rows, measured = sweep(seeds=1, recipes=("baseline",))
    directory = write(tmp_path / "broken", rows, measured)
    (directory / "probes.parquet").write_bytes(b"something else")
    assert run_verb(["forecast", str(directory), "--parameters", "1e9"]) == 2
    assert "holds no measurements of a sweep" in capsys.readouterr().err
    write(directory, [row | {"status": "unfinished"} for row in rows], measured)
    assert run_verb(["forecast", str(directory), "--parameters", "1e9"]) == 2
    assert "no run of" in capsys.readouterr().err
