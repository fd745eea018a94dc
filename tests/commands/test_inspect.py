"""`megatron-stable inspect`: what it prints of a trained run, and how it ends where there is nothing to print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from math import inf
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console

from megatron_stable.analysis.inspection import inspect
from megatron_stable.analysis.position import Position
from megatron_stable.analysis.second_opinion import hear
from megatron_stable.commands.app import main
from megatron_stable.commands.inspect import _print_opinion
from megatron_stable.data import IndexedDataset, Tokenizer
from megatron_stable.stability.opinion import Answer, Question, Recorded
from tests.commands.conftest import SmallDemo


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Verb = Callable[..., Result]


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verb:
    """The command in this process, which has torch imported already."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["megatron-stable", "inspect", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return Result(int(ended.value.code or 0), *capsys.readouterr())

    return run


def test_json_has_every_sample_with_its_documents_and_losses(small: SmallDemo, verb: Verb) -> None:
    result = verb(small.run, "--step", 6, "--checkpoint", 12, "--json", "--excerpt", 30)
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    found = inspect(small.run, 6, checkpoints=[12], excerpt=30)
    assert (facts["step"], facts["data_step"], facts["checkpoints"]) == (6, 6, [12])
    assert [sample["number"] for sample in facts["samples"]] == list(range(40, 48))
    for sample, expected in zip(facts["samples"], found.samples, strict=True):
        assert sample["losses"] == pytest.approx(expected.losses, rel=1e-5)
        assert [d["number"] for d in sample["documents"]] == [d.number for d in expected.documents]
    assert facts["recorded"]["loss"] > 0
    assert facts["opinion"] is None
    assert facts["no_opinion"] == "too few losses are recorded before step 6: 5, and it takes 16"


def test_excerpts_are_the_text_of_the_documents(small: SmallDemo, verb: Verb) -> None:
    data, tokenizer = IndexedDataset(small.directory / "train"), Tokenizer(small.directory / "tokenizer.model")
    facts = json.loads(verb(small.run, "--step", 1, "--json", "--excerpt", 20).stdout)
    for sample in facts["samples"]:
        assert sum(document["tokens"] for document in sample["documents"]) == 64
        for document in sample["documents"]:
            start = data.document_span(document["number"])[0] + document["first"]
            text = tokenizer.decode(data.read(start, document["tokens"]).tolist())[:20]
            shown = document["excerpt"].removesuffix("…").encode("ascii", "backslashreplace").decode()
            assert shown == repr(text + '"')[1:-2].encode("ascii", "backslashreplace").decode().replace("\\'", "'")


def test_tables_and_verdict(small: SmallDemo, verb: Verb) -> None:
    plain = verb(small.run, "--step", 6)
    assert plain.returncode == 0, plain.stderr
    assert f"step 6, data step 6: samples 40 to 47, 512 tokens of {small.directory / 'train'}" in plain.stdout
    assert "recorded then: loss " in plain.stdout and "erdict" not in plain.stdout
    measured = verb(small.run, "--step", 6, "--checkpoint", 12)
    found = inspect(small.run, 6, checkpoints=[12])
    rows = [line.split() for line in measured.stdout.splitlines()]
    shown = [int(row[0]) for row in rows if len(row) > 3 and row[0].isdigit() and row[3] == "train"]
    assert shown == [sample.number for sample in found.by_loss]
    assert "No verdict: too few losses are recorded before step 6" in measured.stdout


def test_what_stood_out_before_is_told_where_the_flight_recorder_has_the_step(small: SmallDemo, verb: Verb) -> None:
    rows = [{"step": step, "attention/max_logit/layer_01": 3.0 if step < 10 else 300.0} for step in range(1, 13)]
    path = small.run / "flight" / "step_00000012.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        words = "attention/max_logit at layer 1: from 3 to 300, × 100, since step 10"
        assert words in verb(small.run, "--step", 12).stdout
        (standout,) = json.loads(verb(small.run, "--step", 11, "--json").stdout)["before"]["standouts"]
        assert (standout["layer"], standout["onset"], standout["level"]) == (1, 10, pytest.approx(3))
        assert "nothing left its own level" in verb(small.run, "--step", 9).stdout
    finally:
        path.unlink()
        path.parent.rmdir()
    assert json.loads(verb(small.run, "--step", 11, "--json").stdout)["before"] is None


def test_the_opinion_in_words() -> None:
    question = Question(21, tuple(Recorded(step, 3.0) for step in (17, 13, 9, 5)), (Recorded(21, 4.0),))
    endless = question._replace(recent=(Recorded(21, inf),))

    def printed(question: Question, answers: dict[int, Answer]) -> str:
        out = StringIO()
        _print_opinion(
            hear(question, answers),
            Position(21, 31, ((120, 124),), None, (), (31, 31)),
            Path("run"),
            Console(file=out, width=200),
        )
        return out.getvalue()

    data = printed(question, {20: Answer(0.96, 0.02, 0.1)})
    assert "Verdict: the data are to blame." in data
    assert "risen by 1 nats at step 21; asked about 4 batches from before and 1 since" in data
    assert "- checkpoint 20: those since are harder by 0.96 ± 0.02; those from before are +0.1 from their" in data
    assert "skip run --from-step 31 --to-step 31" in data
    state = printed(question, {22: Answer(0.1, 0.02, 0.9)})
    assert "the state is to blame" in state and "A checkpoint from before step 21 makes it more certain" in state
    unknown = printed(endless, {20: Answer(0.0, 0.0, inf)})
    assert "Verdict: undecided." in unknown and "was not finite at step 21" in unknown
    assert "- checkpoint 20 gives no finite loss on all of them" in unknown
    assert "Checkpoint 20 is not heard" in printed(question, {20: Answer(0.0, 0.02, 2.0)})


def test_a_terminal_of_few_characters(small: SmallDemo) -> None:
    command = [sys.executable, "-m", "megatron_stable", "inspect", str(small.run), "--step", "6"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    assert "\\u2026" in result.stdout and result.stderr == ""


def test_what_cannot_be_ends_with_a_message_and_its_exit_code(small: SmallDemo, verb: Verb, tmp_path: Path) -> None:
    for arguments, code, words in [
        ((tmp_path, "--step", 1), 5, ["no run in"]),
        ((small.run, "--step", 13), 2, ["no step 13", "steps 1 to 12", "--data-step"]),
        ((small.run,), 2, ["--step", "--data-step"]),
        (
            (small.run, "--step", 1, "--checkpoint", 12, "--checkpoint", 7),
            5,
            ["no checkpoint of step 7; it has ", "12"],
        ),
        ((small.run, "--step", 1, "--tokenizer", tmp_path / "none"), 5, ["none"]),
    ]:
        result = verb(*arguments)
        assert result.returncode == code, result.stderr
        assert all(word in result.stderr for word in words), result.stderr
        assert "Traceback" not in result.stderr and result.stdout == ""
