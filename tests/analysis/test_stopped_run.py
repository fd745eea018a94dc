"""However a run comes to skip data, it trains on the same data as a run that was told so at the start."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_stable.analysis.stopped_run import Changes, StoppedRun
from megatron_stable.checkpoint import store
from megatron_stable.checkpoint.catalog import newest_whole, summary
from megatron_stable.config.load import load_config
from megatron_stable.errors import ConfigError, DataError
from tests.checkpoint.stored import contents, equal
from tests.harness.ranks import RankError, Ranks
from tests.training.faults import run_of, train_with_faults
from tests.training.runs import SEQUENCE, Values, layout, metrics, train, write_data

STEPS, SAMPLES, TOKENS = 36, 8, 12000
WINDOWS = [(12, 14), (24, 31)]
Order = dict[int, tuple[Any, ...]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_data(tmp_path / "data", tokens=TOKENS)
    return tmp_path


def small(folder: Path, name: str, steps: int = STEPS, mode: str = "watch", **sections: Any) -> Values:
    model = {"layers": 2, "hidden": 16, "heads": 2}
    sections = {"model": model, "batch": {"micro_size": 4}, "parallel": layout(), **sections}
    guard = {"mode": mode, "patience": 4, "max_consecutive_drops": 3}
    return run_of(folder, name, steps, guard=guard, **sections)


def directory(values: Values) -> Path:
    return Path(values["run"]["directory"])


def go(ranks: Ranks, values: Values, world: int = 1, **sections: Any) -> Values:
    """Train with some sections changed; returns the settings for the next start."""
    values = {name: {**fields, **sections.get(name, {})} for name, fields in values.items()}
    assert ranks.run(world, train, values) == [0] * world
    return values


def order(values: Values) -> Order:
    """By step: the data step, the tokens consumed, loss and gradient norm."""
    keys = ("data_step", "tokens", "loss", "grad_norm")
    return {step: tuple(record[key] for key in keys) for step, record in metrics(directory(values)).items()}


def kept(steps: int = STEPS) -> list[int]:
    skipped = {d for first, last in WINDOWS for d in range(first, last + 1)}
    return [d for d in range(1, 200) if d not in skipped][:steps]


@pytest.fixture(scope="module")
def told(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Values:
    """A run that knows the windows from the start."""
    folder = tmp_path_factory.mktemp("told")
    write_data(folder / "data", tokens=TOKENS)
    return go(ranks, small(folder, "told", data={"skip": WINDOWS}))


def last(values: Values) -> dict[str, Any]:
    return contents(store.entries(directory(values) / "checkpoints")[-1].directory)


def same(one: Values, other: Values) -> None:
    assert order(one) == order(other)
    assert [data_step for data_step, *_ in order(one).values()] == kept()
    assert [tokens for _, tokens, *_ in order(one).values()] == [n * SAMPLES * SEQUENCE for n in range(1, STEPS + 1)]
    assert equal(last(one), last(other)), "not the same weights and moments"
    for values in (one, other):
        state = store.entries(directory(values) / "checkpoints")[-1].manifest.state  # type: ignore[union-attr]
        assert state.course.windows.stretches == tuple(((a - 1) * SAMPLES, b * SAMPLES) for a, b in WINDOWS)
        assert state.course.data_step(STEPS) == kept()[-1]


def test_set_in_the_configuration_at_stops(ranks: Ranks, folder: Path, told: Values) -> None:
    values = go(ranks, small(folder, "run"), run={"steps": 11})
    values = go(ranks, values, data={"skip": WINDOWS[:1]}, run={"steps": 19})
    values = go(ranks, values, data={"skip": WINDOWS}, run={"steps": STEPS})
    same(values, told)


def test_by_the_tool_after_stops(ranks: Ranks, folder: Path, told: Values) -> None:
    """Each time the run has trained on the data already, and goes back."""
    values = go(ranks, small(folder, "run"), run={"steps": 20})
    for window, back, until in ((WINDOWS[0], 10, 28), (WINDOWS[1], 20, STEPS)):
        stopped = StoppedRun(directory(values))
        intervention = stopped.without_data([window], Changes())
        assert intervention.rollback_to == back
        stopped.apply(intervention)
        values = go(ranks, values, run={"steps": until})
    same(values, told)


def test_the_tool_skips_data_ahead_without_going_back(ranks: Ranks, folder: Path, told: Values) -> None:
    values = go(ranks, small(folder, "run"), run={"steps": 11})
    stopped = StoppedRun(directory(values))
    intervention = stopped.without_data(WINDOWS, Changes())
    assert intervention.rollback_to == 11
    assert stopped.apply(intervention) == []
    same(go(ranks, values, run={"steps": STEPS}), told)


@pytest.mark.full
def test_on_another_layout_after_the_stop(ranks: Ranks, folder: Path) -> None:
    """Compared with a run that changes to that layout at the same step, so that rounding is the same as well."""
    values = go(ranks, small(folder, "run"), run={"steps": 20})
    stopped = StoppedRun(directory(values))
    stopped.apply(stopped.without_data(WINDOWS[:1], Changes()))
    other = layout(tensor=2)
    values = go(ranks, values, 2, parallel=other, data={"skip": WINDOWS[1:]}, run={"steps": 25})
    values = go(ranks, values, parallel=layout(), run={"steps": STEPS})
    from_start = small(folder, "told", data={"skip": WINDOWS})
    for world, parallel, until in ((1, layout(), 10), (2, other, 25), (1, layout(), STEPS)):
        from_start = go(ranks, from_start, world, parallel=parallel, run={"steps": until})
    same(values, from_start)


def train_until(values: Values, step: int, faults: list[dict[str, Any]]) -> Any:
    """On a rank: die at a step after an intervention, without a word and without a checkpoint."""
    from megatron_stable.records.callbacks import Callbacks

    record = Callbacks.record

    def dying(self: Callbacks, line: dict[str, Any]) -> None:
        record(self, line)
        if line["step"] == step and (directory(values) / "interventions.json").is_file():
            os._exit(9)

    Callbacks.record = dying  # type: ignore[method-assign, assignment]
    return train_with_faults(values, faults)


def test_killed_between_the_tool_and_the_next_checkpoint(ranks: Ranks, folder: Path, told: Values) -> None:
    values = go(ranks, small(folder, "run"), run={"steps": 20})
    stopped = StoppedRun(directory(values))
    stopped.apply(stopped.without_data(WINDOWS, Changes()))
    values["run"]["steps"] = STEPS
    for died_at in (11, 13):
        with pytest.raises(RankError, match="ended without a report"):
            ranks.run(1, train_until, values, died_at, [])
    assert max(metrics(directory(values))) == 20, "it came to that step, and not to a checkpoint"
    same(go(ranks, values), told)


@pytest.mark.parametrize("killed", [False, True])
def test_by_recovery_in_the_live_run(ranks: Ranks, folder: Path, killed: bool) -> None:
    values = small(folder, "run", mode="recover")
    faults = [{"kind": "inf_loss", "data_steps": (22, 24)}]
    if killed:
        with pytest.raises(RankError):
            ranks.run(1, train_until, values, 17, faults)
    assert ranks.run(1, train_with_faults, values, faults)[0][0] == 0
    interventions = StoppedRun(directory(values)).done.items
    assert [item.rule for item in interventions] == ["consecutive drops"]
    assert interventions[0].rollback_to == 15
    from_start = small(folder, "told", mode="recover", data={"skip": [list(w) for w in interventions[0].windows]})
    assert ranks.run(1, train_with_faults, from_start, faults)[0][0] == 0
    assert order(values) == order(from_start)
    assert equal(last(values), last(from_start))


def test_abandoned_checkpoints(ranks: Ranks, folder: Path) -> None:
    values = go(ranks, small(folder, "run"), run={"steps": 30})
    stopped = StoppedRun(directory(values))
    assert stopped.apply(stopped.without_data(WINDOWS[:1], Changes())) == [15, 20, 25, 30]
    root = directory(values) / "checkpoints"

    def there() -> dict[int, bool]:
        return {entry.step: entry.abandoned for entry in store.entries(root)}

    assert there() == {step: step > 10 for step in range(5, 31, 5)}
    assert [summary(e, None, False)["health"] for e in store.entries(root)][1:] == ["healthy", *["abandoned"] * 4]
    assert newest_whole(directory(values)).step == 10, "for evaluate, generate and convert too"
    assert (root / "latest").read_text() == "step_00000010\n"
    values = go(ranks, values, run={"steps": 18}, checkpoint={"every": 9})
    assert order(values)[11][0] == 11 and order(values)[12][0] == 15, "went on from 10"
    assert there() == {5: False, 10: False, 18: False, 20: True, 25: True, 30: True}, "passed, and not yet passed"
    last_, gone = StoppedRun(directory(values)).undo()
    assert (last_.rollback_to, gone) == (10, [18])
    assert there() == {5: False, 10: False, 18: True, 20: False, 25: False, 30: False}
    assert (root / "latest").read_text() == "step_00000030\n"
    values = go(ranks, values, run={"steps": STEPS})
    assert [data_step for data_step, *_ in order(values).values()][-6:] == list(range(31, STEPS + 1))
    assert 18 not in there(), "what was undone is passed as well"


def test_what_cannot_be_done(ranks: Ranks, folder: Path) -> None:
    values = go(ranks, small(folder, "run"), run={"steps": 20})
    stopped = StoppedRun(directory(values))
    with pytest.raises(ConfigError, match="nothing to undo"):
        stopped.undo()
    with pytest.raises(DataError, match="no usable checkpoint from before step 3; it has 5, 10, 15, 20"):
        stopped.without_data([(3, 4)], Changes())
    with pytest.raises(DataError, match="no usable checkpoint of step 12"):
        stopped.without_data([(13, 14)], Changes(), 12)
    with pytest.raises(ConfigError, match="has trained on that data"):
        stopped.without_data([(13, 14)], Changes(), 15)
    with pytest.raises(ConfigError, match="1 <= first <= last"):
        stopped.without_data([(14, 13)], Changes())
    for factor in (0.0, -1.0, 1.5, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="above 0 and up to 1"):
            Changes(clip_factor=factor)
    late, early = StoppedRun(directory(values)), StoppedRun(directory(values))
    early.apply(early.without_data([(13, 14)], Changes()))
    with pytest.raises(ConfigError, match="changed meanwhile"):
        late.apply(late.without_data([(18, 18)], Changes()))
    with pytest.raises(ConfigError, match="skipped already"):
        early.without_data([(13, 13)], Changes())
    assert early.without_data([(13, 10**12)], Changes()).onset == 13
    with pytest.raises(ConfigError, match="1 <= first <= last < 281474976710656"):
        early.without_data([(13, 10**20)], Changes())


def test_what_starts_a_run_that_was_moved(ranks: Ranks, folder: Path) -> None:
    values = go(ranks, small(folder, "run"), 2, run={"steps": 6})
    command = StoppedRun(directory(values)).command()
    assert command == ["megatron-stable", "pretrain", "--config", f"{folder}/run/config.yaml", "--ranks", "2"]
    directory(values).rename(folder / "moved")
    stopped = StoppedRun(folder / "moved")
    assert stopped.command()[-1] == f"run.directory={folder}/moved"
    assert load_config(stopped.directory.config, stopped.command()[-1:]).run.directory == f"{folder}/moved"
