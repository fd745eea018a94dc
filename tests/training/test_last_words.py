"""What the lifeline says goes into the ledger of its own start; the loss of rank 0 only if it is silent there, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_stable.parallel.notice import Lost, Suspected, Waiting, WentOn
from megatron_stable.records import owner
from megatron_stable.records.directory import RunDirectory
from megatron_stable.training.last_words import STACKS, LastWords

SILENT = Lost(7, 1, "no word from rank 0 on node1 for 40 s", {"rank 3": "  File …"}, rank_0="silent")


class Run:
    """A run's directory with an owner, and the words of a rank of this start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.owner = owner.Owner.myself()
        self.count(1)
        self.words = LastWords()
        self.words.begin(path, self.owner.token)

    def count(self, beats: int) -> None:
        self.owner = self.owner.model_copy(update={"beats": beats})
        (self.path / owner.OWNER).write_text(self.owner.model_dump_json())

    def ledger(self) -> list[dict[str, Any]]:
        path = self.path / "ledger.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(owner, "BEAT", 0.0)
    return Run(tmp_path)


def test_words_become_events(run: Run) -> None:
    run.words(Waiting(7, False, 34.0, (5,), "rank 5 on node2", False))
    run.words(WentOn(7, False, 47.0))
    run.words(Lost(9, 1, "rank 5 on node2 was lost", {f"rank {rank}": "stack" for rank in range(20)}))
    waiting, went_on, stop = run.ledger()
    assert (waiting["event"], waiting["step"], waiting["ranks"]) == ("waiting", 7, [5])
    assert (went_on["event"], went_on["seconds"]) == ("went_on", 47.0)
    assert (stop["event"], stop["exit_code"], stop["reason"]) == ("stop", 1, "rank 5 on node2 was lost")
    assert len(stop["stacks"]) == STACKS
    assert "has taken 34 s; waiting for rank 5 on node2" in RunDirectory(run.path).logbook.read_text()


def test_another_start_is_left_alone(run: Run) -> None:
    other = owner.Owner.myself()
    (run.path / owner.OWNER).write_text(other.model_dump_json())
    run.words(Lost(9, 1, "rank 0 on node1 was lost", {}, rank_0="gone"))
    (run.path / owner.OWNER).unlink()
    run.words(Lost(9, 1, "rank 0 on node1 was lost", {}, rank_0="gone"))
    assert run.ledger() == []


def test_before_training_nothing_is_kept(tmp_path: Path) -> None:
    LastWords()(SILENT)
    assert [*tmp_path.iterdir()] == []


def test_a_rank_0_that_stands_still_is_spoken_for(run: Run) -> None:
    run.words(Suspected())
    run.words(SILENT)
    (stop,) = run.ledger()
    assert (stop["reason"], stop["stacks"]) == (SILENT.reason, SILENT.stacks)


def test_a_rank_0_that_lives_on_the_other_side_speaks_for_itself(run: Run) -> None:
    run.words(Suspected())
    run.count(2)
    run.words(SILENT)
    assert run.ledger() == []


def test_nobody_speaks_for_rank_0_without_having_watched_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.words(SILENT)
    monkeypatch.setattr(owner, "BEAT", 10.0)
    run.words(Suspected())
    run.words(SILENT)
    assert run.ledger() == []
