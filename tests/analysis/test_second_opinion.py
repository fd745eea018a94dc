"""Data or state, asked of checkpoints: the right question of what a run recorded, and the right answer of real runs."""

from __future__ import annotations

import json
from math import inf
from pathlib import Path
from typing import Any

import pytest

from megatron_stable.analysis.inspection import inspect
from megatron_stable.analysis.second_opinion import Heard, Posed, hear, pose
from megatron_stable.stability.opinion import Answer
from tests.harness.ranks import Ranks
from tests.training.faults import RARE, poison, run_of, train_with_faults
from tests.training.runs import VOCAB, metrics, write_data

CHANGE, STEPS = 30, 40


def lines(losses: list[float | None], first: int = 1, skipped: int = 0) -> list[dict[str, Any]]:
    """Of steps with these losses, nats, and batches of 4; data steps are ahead by ``skipped``."""
    return [
        {"step": n, "data_step": n + skipped, "samples": [[4 * (n + skipped) - 4, 4 * (n + skipped)]], "loss": loss}
        for n, loss in enumerate(losses, first)
    ]


def places(*data_steps: int) -> list[tuple[tuple[int, int]]]:
    return [((4 * n - 4, 4 * n),) for n in data_steps]


def wavy(steps: int) -> list[float | None]:
    return [3.0 + 0.05 * (-1) ** n for n in range(steps)]


def test_a_rise_is_asked_about_with_the_steps_that_belong_to_it() -> None:
    record = lines([*wavy(20), 4.0, 3.6, 3.4, 5.0])
    posed = pose(record, record[20])
    assert isinstance(posed, Posed)
    assert posed.question.onset == 21
    assert [batch.step for batch in posed.question.old] == [17, 13, 9, 5]
    assert [batch.step for batch in posed.question.recent] == [21, 22], "step 23 is back, by more than half"
    assert posed.question.rise == pytest.approx(3.8 - 3.05)


def test_at_most_four_and_none_from_after_a_rollback() -> None:
    record = lines([*wavy(20), *[4.0] * 8])
    assert [batch.step for batch in pose(record, record[20]).question.recent] == [21, 22, 23, 24]  # type: ignore[union-attr]
    again = [*record[:22], *lines([4.1] * 8, first=15)]
    assert [batch.step for batch in pose(again, record[20]).question.recent] == [21, 22]  # type: ignore[union-attr]


def test_the_record_counts_as_it_stood_when_the_step_was_trained() -> None:
    """Steps 11 to 20 were trained twice, on other data the second time."""
    first, second = lines([*wavy(20), 4.0]), lines([*wavy(10), 5.0], first=11, skipped=100)
    before, after = pose([*first, *second], first[20]), pose([*first, *second], second[10])
    assert isinstance(before, Posed) and isinstance(after, Posed)
    assert before.samples == dict(zip([17, 13, 9, 5, 21], places(17, 13, 9, 5, 21), strict=True))
    assert after.samples == dict(zip([17, 13, 9, 5, 21], places(117, 113, 9, 5, 121), strict=True))
    assert (before.question.recent[0].loss, after.question.recent[0].loss) == (4.0, 5.0)


def test_a_loss_that_is_not_finite_is_an_endless_rise() -> None:
    record = lines([*wavy(20), None, None, 3.0])
    posed = pose(record, record[20])
    assert isinstance(posed, Posed) and posed.question.rise == inf and len(posed.question.recent) == 1
    assert hear(posed.question, {15: Answer(gap=0.1, error=0.01, behind=0.1)}).verdict == "state"
    assert hear(posed.question, {15: Answer(gap=0.0, error=0.0, behind=inf)}).verdict == "undecided"


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([*wavy(20), 3.1, 9.0], "the loss had not risen at step 21: it was 3.1, and 3 ± 0.052 in the 16 steps before"),
        ([*wavy(15), 4.0], "too few losses are recorded before step 16: 15, and it takes 16"),
        ([*wavy(8), *[None] * 8, 4.0], "too few losses are recorded before step 17: 8, and it takes 16"),
    ],
)
def test_no_question_where_nothing_rose_or_too_little_is_known(losses: list[float | None], words: str) -> None:
    record = lines(losses)
    assert pose(record, next(line for line in record[8:] if line["loss"] and line["loss"] > 3.05)) == words
    assert pose(record, None) == "no loss is recorded of this step"


def test_who_is_asked_for_what() -> None:
    record = lines([*wavy(20), 4.0])
    posed = pose(record, record[20])
    assert isinstance(posed, Posed)
    both, none, ignorant = Answer(0.95, 0.01, 0.0), Answer(0.05, 0.01, 0.9), Answer(0.0, 0.01, 2.0)

    def heard(answers: dict[int, Answer]) -> tuple[str, int | None, int | None, bool]:
        found = hear(posed.question, answers)
        return found.verdict, found.now, found.healthy, found.ignorant

    assert heard({20: both}) == ("data", None, 20, False)
    assert heard({20: none}) == ("state", None, 20, False)
    assert heard({20: ignorant}) == ("undecided", None, 20, True)
    assert heard({21: none}) == ("state", 21, None, False), "checkpoint 21 has trained on step 21"
    assert heard({21: none, 20: both, 10: none, 15: none}) == ("data", 21, 20, False), "it has forgotten the old"
    assert heard({25: both, 21: none, 10: ignorant}) == ("data", 25, 10, True)


@pytest.fixture(scope="module")
def bad_data(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that met garbage at one step."""
    return trained(ranks, tmp_path_factory.mktemp("data"), garbage=True)


@pytest.fixture(scope="module")
def bad_state(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that climbed its gradient for some steps."""
    ascent = {"kind": "scale_gradient", "data_steps": (CHANGE, CHANGE + 29), "factor": -100}
    return trained(ranks, tmp_path_factory.mktemp("state"), ascent)


def trained(ranks: Ranks, folder: Path, *faults: dict[str, Any], garbage: bool = False) -> Path:
    write_data(folder / "data", tokens=20000, vocab=VOCAB - RARE)
    values = run_of(
        folder, "run", STEPS, guard={"mode": "watch"}, model={"dropout": 0.1}, batch={"micro_size": 4},
        optimizer={"learning_rate": 3e-3 if garbage else 2e-2},
    )  # fmt: skip
    if garbage:
        poison(values, range(CHANGE, CHANGE + 1))
    assert [code for code, _ in ranks.run(2, train_with_faults, values, list(faults))] == [0, 0]
    return folder / "run"


def opinion(run: Path, step: int, *checkpoints: int) -> Heard:
    found = inspect(run, step, checkpoints=checkpoints).opinion
    assert isinstance(found, Heard), found
    return found


@pytest.mark.parametrize("checkpoints", [(25,), (25, 40), (35,)])
def test_garbage_at_one_step_is_the_data(bad_data: Path, checkpoints: tuple[int, ...]) -> None:
    heard = opinion(bad_data, CHANGE, *checkpoints)
    assert heard.verdict == "data"
    assert heard.question.rise > 1 and len(heard.question.recent) == 1
    for step, said in heard.answers.items():
        assert said.gap == pytest.approx(heard.question.rise, rel=0.2 if step < CHANGE else 0.5)


@pytest.mark.parametrize("checkpoints", [(25,), (25, 40), (40,)])
def test_an_ascent_of_the_gradient_is_the_state(bad_state: Path, checkpoints: tuple[int, ...]) -> None:
    curve = {step: record["loss"] for step, record in metrics(bad_state).items()}
    worst = max(range(CHANGE, STEPS), key=lambda step: curve[step])
    heard = opinion(bad_state, worst, *checkpoints)
    assert heard.verdict == "state"
    assert all(abs(said.gap) < heard.question.rise / 4 for said in heard.answers.values())


def test_an_ordinary_step_gets_no_verdict(bad_data: Path) -> None:
    words = inspect(bad_data, CHANGE - 2, checkpoints=[25]).opinion  # shortly before the garbage
    assert isinstance(words, str) and words.startswith(f"the loss had not risen at step {CHANGE - 2}: it was ")


def test_what_json_says_is_what_was_heard(bad_data: Path) -> None:
    found = inspect(bad_data, CHANGE, checkpoints=[25])
    assert isinstance(found.opinion, Heard)
    told = json.loads(json.dumps(found.plain()["opinion"]))
    assert (told["verdict"], told["onset"], told["healthy"], told["now"]) == ("data", CHANGE, 25, None)
    assert told["rise"] == found.opinion.question.rise
    assert [batch["step"] for batch in told["old"]] == [26, 22, 18, 14]
    assert told["answers"] == [{"checkpoint": 25, **found.opinion.answers[25]._asdict()}]
