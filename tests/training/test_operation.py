"""The guard's last rung: attempts are used up, and the run operates on itself, on every rank alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_stable.analysis.stopped_run import StoppedRun
from megatron_stable.checkpoint import store
from megatron_stable.checkpoint.catalog import newest_whole
from megatron_stable.checkpoint.reader import Reader
from megatron_stable.config.load import load_config
from megatron_stable.errors import ConfigError
from megatron_stable.records.directory import RunDirectory
from megatron_stable.records.interventions import read_interventions
from megatron_stable.stability.events import GaveUp, Rollback, Surgery
from megatron_stable.training.operation import settle
from tests.harness.ranks import Ranks
from tests.training.faults import run_of, train_with_faults
from tests.training.runs import Values, layout, metrics, write_data

BASE = {"recipe": "baseline"}
GUARD = {"max_rollbacks": 1, "surgery": "qk_norm_cap", "surgery_rewarm": 4}
# the first costs the attempt; the second comes again after surgery, when there is an attempt again
FAULTS = [{"kind": "nan_gradient", "data_steps": [22, 26]}, {"kind": "nan_gradient", "data_steps": [40, 44]}]
LAYOUTS = {
    "alone": (1, layout(), "fp32"),
    "tp2-pp2": (4, layout(tensor=2, pipeline=2), "fp32"),
    "zero3": (2, layout(zero_stage=3), "bf16"),
    "zero2-fp16": (2, layout(zero_stage=2), "fp16"),
}
EVERY = [name if name in ("alone", "tp2-pp2") else pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS]


def values_of(folder: Path, steps: int = 60, name: str = "alone", **guard: Any) -> Values:
    _, parallel, dtype = LAYOUTS[name]
    values = run_of(folder, "run", steps, guard={**GUARD, **guard}, parallel=parallel, precision={"dtype": dtype})
    values["model"] = {**values["model"], **BASE}
    return values


@pytest.mark.parametrize("name", EVERY)
def test_a_run_that_would_end_operates_on_itself_and_goes_on(ranks: Ranks, tmp_path: Path, name: str) -> None:
    world = LAYOUTS[name][0]
    write_data(tmp_path / "data", tokens=12000)
    values = values_of(tmp_path, name=name)
    told = ranks.run(world, train_with_faults, values, FAULTS)
    assert [code for code, _ in told] == [0] * world
    decisions = [[(step, take) for step, take, *_ in said] for _, said in told]
    assert all(each == decisions[0] for each in decisions)
    run = RunDirectory(values["run"]["directory"])
    acts = [each for each in run.ledger.read() if isinstance(each, Rollback | Surgery | GaveUp)]
    assert [type(each) for each in acts] == [Rollback, Surgery, Rollback]
    surgery = acts[1]
    assert isinstance(surgery, Surgery)
    assert surgery.by == "guard"
    assert surgery.verdict in ("unchanged", "continuous")
    assert surgery.changes["model.qk_norm"] == (False, True)
    assert surgery.changes["schedule.rewarm"] == (None, [surgery.rollback_to, 4])
    config = load_config(run.config)
    assert (config.model.qk_norm, config.model.attention_cap) == (True, surgery.changes["model.attention_cap"][1])
    assert json.loads((run.path / "surgery.json").read_text())["before"] == surgery.before

    line = metrics(run.path)
    assert max(line) == 60
    begins = surgery.rollback_to
    rates = [line[begins + n]["learning_rate"] for n in range(1, 6)]
    assert rates == pytest.approx([rates[-1] * n / 4 for n in (1, 2, 3, 4, 4)])
    names = {entry.step: Reader(entry.directory, entry.manifest).names() for entry in usable(run)}
    assert begins in names
    assert all("blocks.0.attention.q_norm.weight" in each for each in names.values())
    kept = Path(surgery.source)
    assert kept == run.path / "before_surgery" / f"step_{begins:08d}"
    assert (kept / "manifest.json").is_file()


def usable(run: RunDirectory) -> list[Any]:
    return [entry for entry in store.entries(run.checkpoints) if entry.usable]


@pytest.fixture(scope="module")
def once(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Values:
    """The settings of a run that has operated on itself, and stopped soon after; they say nothing of it."""
    folder = tmp_path_factory.mktemp("operated")
    write_data(folder / "data", tokens=12000)
    values = values_of(folder, steps=34)
    ((code, _),) = ranks.run(1, train_with_faults, values, [FAULTS[0], {**FAULTS[1], "data_steps": [34, 37]}])
    assert code == 0
    StoppedRun(Path(values["run"]["directory"])).undo()  # a rollback of the other model's
    return values


@pytest.fixture
def operated(once: Values, tmp_path: Path) -> Values:
    """A copy of it."""
    shutil.copytree(once["run"]["directory"], tmp_path / "run")
    return {**once, "run": {**once["run"], "directory": str(tmp_path / "run")}}


def test_the_same_command_goes_on_with_the_other_model(ranks: Ranks, operated: Values) -> None:
    run = RunDirectory(operated["run"]["directory"])
    made = read_interventions(run.path)
    assert made is not None
    assert [bool(item.changes) for item in made.items] == [False, True]
    operated["run"]["steps"] = 38
    # a crash may have come before the configuration of the other model was written
    text = run.config.read_text()
    run.config.write_text(text.replace("qk_norm: true", "qk_norm: false"))
    assert ranks.run(1, train_with_faults, operated, [])[0][0] == 0
    assert max(metrics(run.path)) == 38
    assert load_config(run.config).model.qk_norm
    assert len([each for each in run.ledger.read() if isinstance(each, Surgery)]) == 1


def test_an_operation_that_a_crash_cut_short_is_finished_at_the_next_start(ranks: Ranks, operated: Values) -> None:
    run = RunDirectory(operated["run"]["directory"])
    (item,) = [item for item in read_interventions(run.path).items if item.changes]  # type: ignore[union-attr]
    place = run.checkpoints / f"step_{item.rollback_to:08d}"
    kept = run.path / "before_surgery" / place.name
    for entry in store.entries(run.checkpoints):
        if entry.step > item.rollback_to:
            shutil.rmtree(entry.directory)
    # as it was between the decision and the renaming; and what an operation that was never decided left behind
    place.rename(run.checkpoints / f".operated_{item.id}")
    kept.rename(place)
    (run.checkpoints / ".operated_feedbeef0000").mkdir()
    lines = run.ledger.path.read_text().splitlines()
    run.ledger.path.write_text("\n".join(line for line in lines if '"surgery"' not in line) + "\n")
    assert ranks.run(1, train_with_faults, operated, [])[0][0] == 0
    assert not list(run.checkpoints.glob(".operated_*"))
    assert (
        "blocks.0.attention.q_norm.weight" in Reader(place, newest_whole(run.path, item.rollback_to).manifest).names()
    )
    assert (kept / "manifest.json").is_file()
    told = [each for each in run.ledger.read() if isinstance(each, Surgery)]
    assert [(each.id, each.before) for each in told] == [(item.id, None)]
    assert load_config(run.config).model.qk_norm


def test_settling_twice_does_nothing(operated: Values) -> None:
    run = RunDirectory(operated["run"]["directory"])
    before = sorted(path.name for path in run.checkpoints.iterdir())
    settle(run, read_interventions(run.path))
    assert sorted(path.name for path in run.checkpoints.iterdir()) == before


def test_surgery_cannot_be_undone(operated: Values) -> None:
    with pytest.raises(ConfigError, match="before_surgery"):
        StoppedRun(Path(operated["run"]["directory"])).undo()


def test_without_it_the_run_ends(ranks: Ranks, tmp_path: Path) -> None:
    write_data(tmp_path / "data", tokens=12000)
    values = values_of(tmp_path, surgery=None)
    assert ranks.run(1, train_with_faults, values, FAULTS)[0][0] == 3


def test_what_cannot_be_operated_on_ends_the_run_as_before(ranks: Ranks, tmp_path: Path) -> None:
    """The checkpoint is damaged just then: a warning, and exit code 3."""
    write_data(tmp_path / "data", tokens=12000)
    values = values_of(tmp_path, max_rollbacks=0)
    assert ranks.run(1, _train_on_damaged, values, FAULTS)[0] == 3
    run = RunDirectory(values["run"]["directory"])
    assert not list(run.checkpoints.glob(".operated_*"))
    assert not [each for each in run.ledger.read() if isinstance(each, Surgery)]


def _train_on_damaged(values: Values, faults: list[dict[str, Any]]) -> int:
    from megatron_stable.errors import DataError
    from megatron_stable.training import operation

    def failing(*_: Any, **__: Any) -> None:
        raise DataError("the disk is gone")

    perform = operation.perform
    operation.perform = failing  # type: ignore[assignment]
    try:
        return train_with_faults(values, faults)[0]
    finally:
        operation.perform = perform
