"""Batch size, micro size and layout may change at any stop: each sample is trained on once, those in windows never."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_stable.analysis.inspection import inspect
from megatron_stable.analysis.stopped_run import Changes, StoppedRun
from megatron_stable.checkpoint import store
from tests.harness.ranks import Ranks
from tests.training.faults import run_of
from tests.training.runs import SEQUENCE, Values, layout, metrics, train, write_data

SMALL = {"layers": 1, "hidden": 16, "heads": 2}


def train_and_tell(values: Values, faults: list[dict[str, Any]]) -> tuple[int, list[int]]:
    """On a rank: the exit code, and the samples that it has read."""
    from megatron_stable.data import Batches
    from megatron_stable.engine.faults import VARIABLE

    os.environ[VARIABLE] = json.dumps(faults)
    seen: list[int] = []
    read = Batches._read

    def telling(self: Batches, k: int) -> Any:
        seen.append(k)
        return read(self, k)

    Batches._read = telling  # type: ignore[method-assign]
    return train(values), seen


class Legs:
    """A run that is started again and again, and what each start has read."""

    def __init__(self, ranks: Ranks, folder: Path, mode: str = "watch", **sections: Any) -> None:
        write_data(folder / "data", tokens=12000)
        self.ranks = ranks
        guard = {"mode": mode, "rollback_steps": 3, "skip_steps": 4, "max_consecutive_drops": 3}
        self.values = run_of(folder, "run", 1, model=SMALL, guard=guard, parallel=layout(), **sections)
        self.run = Path(self.values["run"]["directory"])

    def go(self, until: int, size: int, micro: int, world: int, faults: tuple[dict[str, Any], ...] = ()) -> list[int]:
        """Train to a step; the samples that were read, sorted."""
        sections = {"run": {"steps": until}, "batch": {"global_size": size, "micro_size": micro}}
        self.values = {name: {**fields, **sections.get(name, {})} for name, fields in self.values.items()}
        told = self.ranks.run(world, train_and_tell, self.values, list(faults))
        assert [code for code, _ in told] == [0] * world
        return sorted(k for _, seen in told for k in seen)

    def skip(self, first: int, last: int) -> int:
        """By the tool, in data steps; the step that the run goes back to."""
        stopped = StoppedRun(self.run)
        intervention = stopped.without_data([(first, last)], Changes())
        stopped.apply(intervention)
        return intervention.rollback_to

    def batches(self) -> list[list[int]]:
        """The samples of each step, as recorded."""
        records = sorted(metrics(self.run).items())
        return [[k for first, end in record["samples"] for k in range(first, end)] for _, record in records]


def numbers(*ranges: tuple[int, int]) -> list[int]:
    return [k for first, end in ranges for k in range(first, end)]


def test_each_sample_is_trained_on_once(ranks: Ranks, tmp_path: Path) -> None:
    """Windows on both sides of each change, by the tool and by the configuration, in which they stay."""
    windows = {"skip": [[3, 4], [9, 10], [20, 21]]}  # samples 16-31, 64-79, 152-167
    legs = Legs(ranks, tmp_path, data=windows)
    assert legs.go(5, size=8, micro=4, world=1) == numbers((0, 16), (32, 56))
    assert legs.go(8, size=12, micro=3, world=2) == numbers((56, 64), (80, 108)), "across a window of the old size"
    assert legs.skip(13, 13) == 8, "data steps of 12 samples from sample 56 on, with number 8: ahead"
    assert legs.go(12, size=4, micro=1, world=2) == numbers((108, 116), (128, 136)), "116-127 are the 13th"
    assert legs.go(14, size=24, micro=6, world=1) == numbers((136, 152), (168, 200))
    wanted = numbers((0, 16), (32, 64), (80, 116), (128, 152), (168, 200))
    assert [k for batch in legs.batches() for k in batch] == wanted
    assert [len(batch) for batch in legs.batches()] == [8] * 5 + [12] * 3 + [4] * 4 + [24] * 2
    lines = list(metrics(legs.run).values())
    assert [line["tokens"] for line in lines][-1] == len(wanted) * SEQUENCE
    data_steps = [line["data_step"] for line in lines]
    assert data_steps[:5] == [1, 2, 5, 6, 7] and data_steps == sorted(set(data_steps))
    state = store.entries(legs.run / "checkpoints")[-1].manifest.state  # type: ignore[union-attr]
    assert state.course.skip == ((16, 32), (64, 80), (116, 128), (152, 168))
    found = inspect(legs.run, 6)
    assert [sample.number for sample in found.samples] == numbers((56, 64), (80, 84)), "a step of another batch size"


def test_back_across_a_change(ranks: Ranks, tmp_path: Path) -> None:
    """Data from before the change is skipped: the run goes back there, and takes what follows in batches of today."""
    legs = Legs(ranks, tmp_path, data={"skip": [[12, 12]]})  # samples 88-95
    legs.go(7, size=8, micro=4, world=1)
    legs.go(10, size=16, micro=4, world=2)
    assert legs.skip(6, 7) == 5
    before = legs.batches()[:5]
    assert sorted(legs.go(9, size=16, micro=8, world=1)) == numbers((56, 88), (96, 128))
    assert legs.batches()[:5] == before
    assert [k for batch in legs.batches()[:9] for k in batch] == numbers((0, 40), (56, 88), (96, 128))
    StoppedRun(legs.run).undo()
    assert legs.go(11, size=32, micro=8, world=2) == numbers((112, 144)), "on from step 10 of before"
    wanted = numbers((0, 88), (96, 144))
    state = store.entries(legs.run / "checkpoints")[-1].manifest.state  # type: ignore[union-attr]
    assert [k for step in range(1, 12) for piece in state.course.samples(step) for k in piece] == wanted


def test_the_guard_goes_back_across_a_change(ranks: Ranks, tmp_path: Path) -> None:
    """In the live run; the window holds the samples of batches of both sizes, and no other."""
    legs = Legs(ranks, tmp_path, mode="recover")
    legs.go(7, size=8, micro=4, world=1)
    legs.go(12, 16, 4, 2, ({"kind": "inf_loss", "data_steps": [9, 11]},))
    (intervention,) = StoppedRun(legs.run).done.items
    assert (intervention.rule, intervention.rollback_to) == ("consecutive drops", 5)
    assert (intervention.windows, intervention.samples) == (((7, 11),), ((48, 56 + 4 * 16),))
    assert [k for batch in legs.batches() for k in batch] == numbers((0, 48), (120, 224))
    assert [len(batch) for batch in legs.batches()] == [8] * 5 + [16] * 7


def test_another_sequence_length_is_refused(ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Samples are windows of so many tokens: their numbers would mean others."""
    legs = Legs(ranks, tmp_path)
    legs.go(2, size=8, micro=8, world=1)
    longer = {**legs.values, "model": {**legs.values["model"], "sequence_length": 2 * SEQUENCE}}
    assert ranks.run(1, train, longer) == [2]
    said = capsys.readouterr().out
    assert f"model.sequence_length: {SEQUENCE} there, {2 * SEQUENCE} here" in said
    assert "set these as they were, or choose another run.directory" in said
