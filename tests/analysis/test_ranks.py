"""A trained run on several ranks against the same in one process: the same texts and losses, whatever the layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_stable.analysis.evaluation import evaluate_each, open_data
from megatron_stable.analysis.generation import Sampling, generate_each
from megatron_stable.analysis.ranks import layout
from megatron_stable.analysis.trained import Trained, open_on_ranks, open_run
from megatron_stable.checkpoint.model import load_model
from megatron_stable.errors import ConfigError, MegatronStableError
from megatron_stable.parallel.lifeline import Lifeline
from tests.commands.conftest import SmallDemo, small
from tests.harness.ranks import Ranks
from tests.training.runs import rank_processes

__all__ = ["small"]
PROMPTS = ["def ", "import os\n" * 60, "class A:\n    def __init__(self"]
SAMPLINGS = [Sampling(1.0, 0.9, 3), Sampling(0), Sampling(1.0, 0.9, 5)]


def texts(trained: Trained) -> list[list[int]]:
    ids: list[list[int]] = [[] for _ in PROMPTS]
    for number, token in generate_each(trained, PROMPTS, 70, SAMPLINGS):  # past the window
        ids[number].append(token)
    return ids


def used(run: Path, given: list[str], generates: bool) -> Any:
    """On a rank: what it makes of prompts, and of the run's validation data."""
    lifeline = Lifeline(100.0)
    trained = open_on_ranks(run, None, None, lifeline, given, replicas=not generates)
    made = texts(trained) if generates else None
    found, whole = evaluate_each(trained, {"": open_data(trained)}, 2, micro_size=3)
    held = sum(weight.numel() for weight in trained.model.parameters())
    lifeline.leave()
    return made, whole, list(found), held


@pytest.mark.parametrize("tensor, pipeline, data", [(2, 1, 1), (1, 2, 1), (2, 2, 1), (2, 1, 2)])
def test_ranks_give_what_one_process_gives(
    ranks: Ranks, small: SmallDemo, tensor: int, pipeline: int, data: int
) -> None:
    given = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
    results = ranks.run(tensor * pipeline * data, used, small.run, given, data == 1)
    trained = open_run(small.run)
    wanted = texts(trained) if data == 1 else None
    _, whole = evaluate_each(trained, {"": open_data(trained)}, 2)
    for made, found, names, _ in results:
        assert made == wanted
        assert (found.tokens, found.bytes, names) == (whole.tokens, whole.bytes, [""])
        assert found.loss == pytest.approx(whole.loss, rel=1e-5)
        assert found.standard_error == pytest.approx(whole.standard_error, rel=1e-4)
    # no rank holds more than its part: blocks are split evenly, and the embedding is at one end of two stages
    full = sum(weight.numel() for weight in trained.model.parameters())
    assert max(held for *_, held in results) < 0.75 * full


def diverged(run: Path, generates: bool) -> str:
    """On a rank: the error that it ends with where the model, or the layout, is unusable."""
    lifeline = Lifeline(100.0)
    error = ""
    try:
        trained = open_on_ranks(run, None, None, lifeline, [] if generates else ["parallel.tensor=3"])
        if trained.ranks.last_stage and trained.ranks.tp.rank == 1:
            next(reversed(trained.model.layers.values())).weight.data.fill_(float("nan"))  # type: ignore[operator]
        texts(trained)
    except MegatronStableError as raised:
        assert raised.agreed
        error = str(raised)
    lifeline.leave()
    return error


@pytest.mark.parametrize(("generates", "words"), [(True, "run that diverged"), (False, "3 (parallel.tensor)")])
def test_all_ranks_raise_the_same(ranks: Ranks, small: SmallDemo, generates: bool, words: str) -> None:
    for error in ranks.run(2, diverged, small.run, generates):
        assert words in error


def test_the_verb_starts_ranks_and_says_what_one_process_says(small: SmallDemo) -> None:
    def said(*more: str) -> subprocess.CompletedProcess[str]:
        verb = ["generate", str(small.run), "--prompt=def ", "--prompt=- x\n--", "--tokens=12", "--json", *more]
        command = [sys.executable, "-m", "megatron_stable", *verb]
        return subprocess.run(command, capture_output=True, text=True, timeout=200)

    alone, several = said(), said("--ranks", "2", "parallel.tensor=2")
    assert several.returncode == 0, several.stderr
    assert several.stdout == alone.stdout
    assert len(alone.stdout.splitlines()) == 2
    refused = said("--ranks", "2", "parallel.tensor=4")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.count("start 4, or give another layout, as parallel.tensor=2") == 1
    assert "Traceback" not in refused.stderr


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, "-m", "megatron_stable", *arguments],
        env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_under_torchrun(small: SmallDemo) -> None:
    given = ["--prompt=def ", "--prompt=- x\n--", "--tokens=12", "--json"]
    process = torchrun("generate", str(small.run), *given, "parallel.tensor=2")
    trained = open_run(small.run)
    texts = ["def ", "- x\n--"]
    ids: list[list[int]] = [[], []]
    for number, token in generate_each(trained, texts, 12, [Sampling(0.8, 0.95, 0)] * 2):
        ids[number].append(token)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    told = [json.loads(line) for line in said.splitlines()]
    assert [each["tokens"] for each in told] == [len(each) for each in ids]
    assert trained.tokenizer is not None
    for each, text, found in zip(told, texts, ids, strict=True):
        assert each["prompt"] + each["text"] == trained.tokenizer.decode(trained.tokenizer.encode(text) + found)


@pytest.mark.parametrize("file", [pytest.param("absent", marks=pytest.mark.full), "broken"])
def test_prompts_are_those_of_the_first_rank(small: SmallDemo, tmp_path: Path, file: str) -> None:
    path = tmp_path / "prompts.jsonl"
    if file == "broken":
        path.write_text('"fine"\n{"seed": 1}\n')
    process = torchrun("generate", str(small.run), f"--prompts={path}", "parallel.tensor=2")
    said, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and said == ""  # torchrun has a code of its own
    words = "No such file" if file == "absent" else "prompts.jsonl:2: neither a string"
    assert errors.count(words) == 1 and errors.count("exitcode  : 5") >= 1, errors


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_killed_ends_the_others(small: SmallDemo, lost: int) -> None:
    given = ["--prompt=def ", "--tokens=1000000", "--temperature=0"]
    command = [sys.executable, "-m", "megatron_stable", "generate", str(small.run), *given]
    process = subprocess.Popen(
        [*command, "--ranks=2", "parallel.tensor=2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.read(20).startswith("def ")  # they are at it
        rank_processes(process.pid)[lost].kill()
        _, errors = process.communicate(timeout=60)
    finally:
        for each in (*rank_processes(process.pid).values(), process):
            each.kill()
    assert process.returncode == 1
    assert "a rank was killed by SIGKILL" in errors and "checkpoint" not in errors, errors


def test_the_layout_is_the_runs_unless_another_is_given(small: SmallDemo) -> None:
    config, _, _ = load_model(small.run)
    at = (config.parallel.tensor, config.parallel.pipeline)
    assert layout(config, at[0] * at[1], []) == at
    assert layout(config, 1, []) == (1, 1)
    assert layout(config, 4, ["parallel.tensor=2"]) == (2, 1)
    assert layout(config, 4, ["parallel.pipeline=2", "parallel.tensor=2"], replicas=False) == (2, 2)
    for world, given, words in [
        (4, ["model.hidden=8"], "model.hidden=8"),
        (4, ["parallel.tensor=two"], "parallel.tensor=two"),
        (6, ["parallel.tensor=4"], "a multiple of 4"),
        (8, ["parallel.pipeline=8"], "model.layers 2 cannot fill"),
    ]:
        with pytest.raises(ConfigError, match=words):
            layout(config, world, given)
    with pytest.raises(ConfigError, match="start 2, or"):
        layout(config, 4, ["parallel.tensor=2"], replicas=False)
