"""The file of a sweep: the runs it means, and what is refused before the first of them."""

from __future__ import annotations

from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_stable.config.schema import Config
from megatron_stable.errors import ConfigError
from megatron_stable.study.grid import Grid, read_grid

RATE = "optimizer.learning_rate"


def grid(folder: Path, **given: Any) -> Grid:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"directory": "runs/s", **given}, sort_keys=False))
    return read_grid(path)


def refused(folder: Path, **given: Any) -> str:
    with pytest.raises(ConfigError) as error:
        grid(folder, **given)
    return str(error.value)


def test_a_run_for_each_combination(tmp_path: Path) -> None:
    found = grid(
        tmp_path,
        config={"run": {"steps": 300}, "loss.z_loss": 1e-4},
        axes={
            RATE: [1e-3, 0.1],
            "size": {"small": {"model.hidden": 64}, "large": {"model": {"hidden": 128, "layers": 6}}},
            "run.seed": [1, 2, 3],
        },
    )  # fmt: skip
    assert [cell.name for cell in found.cells[:4]] == [
        "learning_rate=0.001,size=small,seed=1", "learning_rate=0.001,size=small,seed=2",
        "learning_rate=0.001,size=small,seed=3", "learning_rate=0.001,size=large,seed=1",
    ]  # fmt: skip
    assert len({cell.name for cell in found.cells}) == 12
    last = found.cells[-1]
    assert last.labels == {"size": "large"} and last.directory == Path("runs/s/runs") / last.name
    config = last.config
    assert (config.model.hidden, config.model.layers, config.run.seed, config.run.steps) == (128, 6, 3, 300)
    assert config.optimizer.learning_rate == 0.1 and config.loss.z_loss == 1e-4


def test_no_run_is_helped_unless_the_sweep_says_so(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("guard: {mode: recover, surgery: qk_norm}\nrun: {steps: 200}\n")
    axes = {RATE: [0.1]}
    guard = grid(tmp_path, base=str(base), axes=axes).cells[0].config.guard
    assert (guard.mode, guard.surgery, guard.collapse) == ("watch", None, 0.5)
    guard = grid(tmp_path, base=str(base), axes=axes, config={"guard.mode": "recover"}).cells[0].config.guard
    assert (guard.mode, guard.surgery, guard.collapse) == ("recover", None, 0.5)
    helped = {"guard.mode": "recover", "guard.surgery": "qk_norm_cap"}
    assert grid(tmp_path, base=str(base), axes=axes, config=helped).cells[0].config.guard.surgery == "qk_norm_cap"


def test_recipes_and_sizes_take_the_place_of_the_base_s(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    resolved = Config.model_validate({"model": {"size": "10m", "recipe": "qk_norm"}})
    base.write_text(yaml.safe_dump(resolved.model_dump(mode="json")))
    found = grid(
        tmp_path, base=str(base), axes={"model.recipe": ["baseline", "qk_norm"], "model.size": ["tiny", "10m"]}
    )
    shapes = [(cell.config.model.qk_norm, cell.config.model.hidden) for cell in found.cells]
    assert shapes == [(False, 256), (False, 512), (True, 256), (True, 512)]


def test_draws_stay_the_same_as_more_are_added(tmp_path: Path) -> None:
    axes = {
        RATE: {"low": 1e-4, "high": 1.0, "log": True},
        "model.hidden": [64, 128],
        "run.seed": {"low": 1, "high": 999},
    }
    few, many = (grid(tmp_path, axes=axes, draws=draws, seed=5) for draws in (5, 40))
    assert few.cells == many.cells[:5]
    rates = sorted(cell.config.optimizer.learning_rate for cell in many.cells)
    assert all(1e-4 <= rate <= 1 for rate in rates) and len(set(rates)) > 35
    gaps = [log(high / low) for low, high in pairwise(rates)]
    assert max(gaps) < 3, "spread over the decades"
    assert grid(tmp_path, axes=axes, draws=5, seed=6).cells != few.cells


def test_a_list_of_runs(tmp_path: Path) -> None:
    found = grid(tmp_path, runs=[{"name": "the old one", RATE: 1e-3}, {RATE: 0.3, "model": {"recipe": "qk_norm"}}])
    first, second = found.cells
    assert first.labels == {"run": "the old one"} and first.name.startswith("the_old_one_")
    assert second.name == "learning_rate=0.3,recipe=qk_norm" and second.config.model.qk_norm


def test_names_are_fit_for_directories_and_tell_runs_apart(tmp_path: Path) -> None:
    data = ["/data/a/b", "../c d", {"/x": 0.5, "/y": 0.5}, "z" * 300, "z" * 301]
    names = [cell.name for cell in grid(tmp_path, axes={"data.train": data}).cells]
    assert len(set(names)) == 5 and all(len(name) < 140 and "/" not in name and " " not in name for name in names)
    axes = {
        "model.hidden": [64],
        "data.train": ["a"],
        "run.seed": [1],
        "evaluation.every": [5],
        "checkpoint.every": [7],
    }
    assert "evaluation.every=5,checkpoint.every=7" in grid(tmp_path, axes=axes).cells[0].name


def test_all_problems_at_once_before_the_first_run(tmp_path: Path) -> None:
    said = refused(
        tmp_path,
        config={"run.stepz": 5, "model.heads": 3},
        axes={RATE: [1e-3, -1.0], "model.recipe": ["baseline", "qknorm", "qk_norm"]},
    )
    assert "4 problems" in said
    assert "run.stepz: unknown key; did you mean run.steps?" in said
    assert "model.heads 3" in said and "(in 4 of 6 runs)" in said
    assert "optimizer.learning_rate: -1.0 is not allowed" in said and "(in 3 of 6 runs)" in said
    assert '"qknorm" is not allowed' in said and "(in 2 of 6 runs)" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give either axes or runs"),
        ({"axes": {}}, "axes: there are none"),
        ({"runs": []}, "runs: there are none"),
        ({"axes": {RATE: []}}, f"axes: {RATE} has no values"),
        ({"axes": {RATE: 0.1}}, "is not what an axis has"),
        ({"axes": {RATE: [0.1, 0.1]}}, f"axes: {RATE} has 0.1 twice"),
        ({"axes": {"size": [1, 2]}}, "any other name has labels"),
        ({"axes": {"size": {"small": 64}}}, "axes: size, small: 64 is not fields of a run"),
        ({"axes": {"loss": {"a": {RATE: 0.1}}}}, "axes: loss is a column of the table already"),
        ({"axes": {"size": {"a": {RATE: 0.1}}, RATE: [0.1]}}, f"{RATE} is set by {RATE} and by another axis"),
        ({"axes": {RATE: {"low": 1, "high": 2}}}, "say how many runs with draws"),
        ({"axes": {RATE: {"low": 0, "high": 2, "log": True}}, "draws": 3}, "is no range"),
        ({"axes": {RATE: [0.1]}, "draws": 0}, "draws: 0 is too few"),
        ({"axes": {RATE: [0.1]}, "ranks": "two"}, 'ranks: "two" is not the ranks of each run'),
        ({"axes": {RATE: [0.1]}, "seed": 1}, "seed: nothing is drawn without draws"),
        ({"axes": {RATE: [0.1]}, "config": {"steps": 3}}, "config: steps is no field"),
        ({"axes": {RATE: [0.1]}, "config": {"run.directory": "x"}}, "follows from the sweep's directory"),
        ({"axes": {RATE: [0.1]}, "optimizer": {}}, "optimizer: unknown key; a sweep has directory"),
        ({"axes": {RATE: [0.1]}, "directory": None}, "directory is not set"),
        ({"axes": {"run.seed": list(range(101)), RATE: [0.1 * n for n in range(1, 101)]}}, "more than a sweep"),
        ({"axes": {RATE: [0.1]}, "config": {"parallel.tensor": 2}}, "parallel.tensor"),
        ({"runs": [{RATE: 0.1}, {"run.seed": 1234, RATE: 0.1}]}, "is the same run as"),
        ({"axes": {RATE: [0.1]}, "base": "no.yaml"}, "no.yaml: no such file"),
        ({"axes": {RATE: [0.1]}, "config": [1]}, "config: [1] is not fields of a run"),
        ({"axes": {RATE: [0.1]}, "config": {"logging.every": 5}}, "logging.every 5: a sweep goes by the loss of each"),
        ({"runs": [{"name": "a", RATE: 0.1}, {"name": "A", RATE: 0.2}]}, "two runs are called A: name them apart"),
        ({"axes": {"size": {1: {RATE: 0.1}, "1": {RATE: 0.2}}}}, "two runs are called size=1"),
    ],
)  # fmt: skip
def test_what_is_no_sweep_is_refused(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    assert message in refused(tmp_path, **given)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for name, text, message in (
        ("no.yaml", None, "no such file"),
        ("a.yaml", "- 1", "not the keys"),
        ("b", "a: [", "YAML"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_grid(tmp_path / name)
