"""`megatron-stable demo`: it runs what it prints, says what the records say, and goes on from what is there."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any

import pytest

from megatron_stable.commands import demo as module
from megatron_stable.commands.app import run_verb
from megatron_stable.commands.demo import (
    PROMPT,
    RECIPES,
    attempts,
    draw_runs,
    is_made,
    levels,
    newest_step,
    outcome,
    remove,
    train,
)
from megatron_stable.config.load import dump_config, load_config
from megatron_stable.engine.faults import VARIABLE as FAULTS
from megatron_stable.files import write_file
from megatron_stable.records.directory import RunDirectory
from megatron_stable.records.ledger import Ledger
from megatron_stable.records.metrics import read_metrics
from megatron_stable.stability.events import Event, GaveUp, Rollback, Stop, parse
from tests.commands.conftest import SMALL, SmallDemo, small_demo

PNG = b"\x89PNG\r\n\x1a\n"


def commands(said: str) -> list[list[str]]:
    """The arguments of the verbs that the demo announced."""
    lines = said.replace("\\\n", "").splitlines()
    return [shlex.split(line)[2:] for line in lines if line.startswith("   $ ")]


def test_makes_a_trained_model_its_curves_and_a_sample(small: SmallDemo) -> None:
    assert newest_step(small.run) == 12
    losses = [record.get("validation_loss") for record in read_metrics(small.run / "metrics.jsonl")]
    measured = [loss for loss in losses if loss is not None]
    assert len(measured) == 3 and measured[-1] < measured[0]
    assert (small.directory / "training.png").read_bytes().startswith(PNG)
    assert f"\n{PROMPT}" in small.said
    assert f"tensorboard --logdir {small.directory}" in small.said
    runs = " ".join(str(small.directory / recipe) for recipe in RECIPES)
    assert f"report {runs} --output {small.directory / 'report.html'}" in small.said.replace(" \\\n       ", " ")
    for recipe in RECIPES:
        trained = list(read_metrics(small.directory / recipe / "metrics.jsonl"))
        end = sum(record["loss"] for record in trained[-10:]) / 10  # and of the 2 before them
        assert f"training loss: {end:.2f} at its lowest, {end:.2f} at the end" in small.said
        assert f"{recipe} reached step 12 without a rollback" in small.said
    logbook = small.directory / "baseline" / "logbook.md"
    assert str(logbook) in small.said and logbook.is_file()
    configs = [load_config(small.directory / recipe / "config.yaml") for recipe in RECIPES]
    assert [config.model.recipe for config in configs] == list(RECIPES)
    rest = [config.model_dump(exclude={"run": {"directory"}, "model": True}) for config in configs]
    assert rest[0] == rest[1]
    assert configs[0].parallel.tensor == 2


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The verbs as they are called from here on; but for `init` they do nothing, and are taken to have done it."""
    verbs: list[list[str]] = []

    def run(arguments: Sequence[str]) -> int:
        verbs.append(list(arguments))
        if arguments[0] == "init":
            return run_verb(arguments)
        if "--output" in arguments:
            Path(arguments[arguments.index("--output") + 1]).touch()
        return 0

    (tmp_path / "text.jsonl").touch()
    monkeypatch.setattr(module, "run_verb", run)
    monkeypatch.setattr(module, "ended", lambda run, steps: any(f"run.directory={run}" in words for words in verbs))
    monkeypatch.setattr(module, "draw_runs", lambda *_: None)
    return verbs


def test_runs_exactly_what_it_prints(
    called: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "a demo"
    directory.mkdir()
    (tmp_path / "text.jsonl").rename(directory / "text.jsonl")
    assert run_verb(["demo", "--directory", str(directory), "--ranks", "1"]) == 0
    assert commands(capsys.readouterr().out) == called
    assert [words[0] for words in called] == ["init", "tokenizer", "preprocess", "pretrain", "pretrain", "generate"]


@pytest.mark.parametrize(("ranks", "tensor", "micro"), [(1, 1, 8), (2, 2, 8), (4, 2, 4), (8, 2, 2)])
def test_any_number_of_ranks_that_divides_the_batch(
    called: list[list[str]], tmp_path: Path, ranks: int, tensor: int, micro: int
) -> None:
    assert run_verb(["demo", "--directory", str(tmp_path), "--ranks", str(ranks), "batch.global_size=8"]) == 0
    for words, recipe in zip(called[3:5], RECIPES, strict=True):
        assert {f"parallel.tensor={tensor}", f"batch.micro_size={micro}", f"model.recipe={recipe}"} < set(words)
        assert words[words.index("--ranks") + 1] == str(ranks)


@pytest.mark.parametrize("failing", ["tokenizer", "pretrain", "generate"])
def test_the_exit_code_of_a_verb_that_fails_is_passed_on(
    called: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    run = module.run_verb
    monkeypatch.setattr(module, "run_verb", lambda arguments: run(arguments) or 5 * (arguments[0] == failing))
    assert run_verb(["demo", "--directory", str(tmp_path)]) == 5
    assert [words[0] for words in called].index(failing) == len(called) - 1


def test_training_that_was_stopped_ends_the_demo(
    called: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "ended", lambda *_: False)
    assert run_verb(["demo", "--directory", str(tmp_path), *SMALL]) == 0
    assert called[-1][0] == "pretrain"
    assert "Stopped at step 0 of 12. The same command goes on from here." in capsys.readouterr().out


def test_other_settings_than_those_there_are_refused(
    called: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = ["demo", "--directory", str(tmp_path)]
    assert run_verb([*demo, *SMALL]) == run_verb([*demo, *SMALL]) == run_verb(demo) == 0
    assert run_verb([*demo, *SMALL, "run.steps=13"]) == 2
    assert "config.yaml was made with other settings" in capsys.readouterr().err


def test_a_second_call_uses_what_is_there(small: SmallDemo) -> None:
    kept = [small.directory / name for name in ("config.yaml", "text.jsonl", "tokenizer.model", "train.bin")]
    kept += [small.directory / recipe / "metrics.jsonl" for recipe in RECIPES]
    before = [path.stat().st_mtime_ns for path in kept]
    again = small_demo(small.directory, "--ranks", "2", *SMALL)
    assert again.code == 0
    assert again.said.count("is there already") == len(kept)
    assert [path.stat().st_mtime_ns for path in kept] == before


@pytest.mark.full
def test_a_run_that_gives_up_is_what_the_demo_shows(
    small: SmallDemo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes on with training that is not finished, too."""
    run = tmp_path / "baseline"
    shutil.copytree(small.directory / "baseline", run)
    overrides = ["run.steps=20", "guard.max_consecutive_drops=2", "guard.max_rollbacks=1"]
    config = load_config(small.directory / "config.yaml", overrides)
    write_file(tmp_path / "config.yaml", dump_config(config).encode())
    monkeypatch.setenv(FAULTS, json.dumps([{"kind": "inf_loss", "data_steps": [15, 500]}]))
    train("title", run, config, ranks=2)
    said = capsys.readouterr().out
    events = RunDirectory(run).ledger.read()
    (back,) = [event.rollback_to for event in events if isinstance(event, Rollback)]
    assert f"baseline diverged: the guard rolled back to step {back}, then gave up with exit code 3" in said
    first, second = ([record["step"] for record in part] for part in attempts(run))
    assert (first, second[0]) == (list(range(1, 17)), back + 1)
    draw_runs([run, small.run], config, tmp_path / "two.png")
    draw_runs([run], config, tmp_path / "one.png")
    one, two = ((tmp_path / name).read_bytes() for name in ("one.png", "two.png"))
    assert one.startswith(PNG) and one != two

    train("title", run, config, ranks=2)
    again = capsys.readouterr().out
    assert "is there already" in again and "then gave up" in again
    assert RunDirectory(run).ledger.read() == events, "nothing is trained again"


def test_what_is_older_than_its_source_is_made_anew(tmp_path: Path) -> None:
    product, other, source = (tmp_path / name for name in ("product", "other", "source"))
    for path, time in ((product, 20), (other, 30), (source, 20)):
        path.touch()
        os.utime(path, (time, time))
    assert is_made([product, other], [source])
    assert is_made([product], [])
    os.utime(source, (25, 25))
    assert not is_made([product, other], [source])
    other.unlink()
    assert not is_made([product, other], [])


def test_fresh_removes_what_the_demo_made_and_nothing_else(small: SmallDemo, tmp_path: Path) -> None:
    directory = tmp_path / "demo"
    shutil.copytree(small.directory, directory)
    (directory / "notes.txt").write_text("mine")
    remove(directory)
    assert [path.name for path in directory.iterdir()] == ["notes.txt"]
    (directory / "baseline").mkdir()  # of something else: there is no text of a demo beside it
    (directory / "config.yaml").write_text("mine")
    remove(directory)
    assert sorted(path.name for path in directory.iterdir()) == ["baseline", "config.yaml", "notes.txt"]


def rollback(step: int, by: str = "guard") -> Event:
    return parse({"event": "rollback", "step": 90, "id": "x", "by": by, "rule": "divergence", "rollback_to": step})


GAVE_UP = parse({"event": "gave_up", "step": 99, "by": "guard", "rule": "divergence"})
STOP = Stop(step=99, exit_code=3, reason="diverged")


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], "reached step 9 without a rollback"),
        ([rollback(4, by="user")], "reached step 9 without a rollback"),
        ([rollback(60)], "diverged: the guard rolled back to step 60, and the run went on to step 9"),
        (
            [rollback(60), rollback(40), GAVE_UP, STOP],
            "diverged: the guard rolled back to step 60, then rolled back to step 40, then gave up with exit code 3",
        ),
        ([GAVE_UP, STOP], "diverged: the guard gave up with exit code 3"),
        ([GAVE_UP, STOP, parse({"event": "undo", "step": 9, "id": "x", "by": "user"})], "reached step 9"),
    ],
)
def test_the_end_of_a_run_is_told_by_its_ledger(tmp_path: Path, events: list[Event], expected: str) -> None:
    assert all(type(event) in (Rollback, GaveUp, Stop) or event.event == "undo" for event in events)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for event in events:
        ledger.write(event)
    assert outcome(ledger.read(), 9).startswith(expected)


def test_losses_are_told_over_all_attempts(tmp_path: Path) -> None:
    def written(*lines: tuple[int, float | None]) -> list[list[dict[str, Any]]]:
        text = "\n".join(json.dumps({"step": step, "loss": loss}) for step, loss in lines)
        (tmp_path / "metrics.jsonl").write_text(text)
        return attempts(tmp_path)

    parts = written(*((n, 4.0 - 0.1 * n) for n in range(1, 21)), *((n, 3.5) for n in range(11, 21)), (21, None))
    assert [[part[0]["step"], part[-1]["step"]] for part in parts] == [[1, 20], [11, 21]]
    assert levels(parts) == pytest.approx((2.45, 3.5))
    assert all(map(isnan, levels(written((1, None)))))
