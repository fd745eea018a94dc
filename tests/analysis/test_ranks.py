"""A trained run on several ranks against the same in one process: the same texts and losses, whatever the layout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_stable.analysis.evaluation import evaluate, evaluate_each, open_data
from megatron_stable.analysis.generation import Sampling, generate_each
from megatron_stable.analysis.ranks import layout
from megatron_stable.analysis.trained import Trained, open_on_ranks, open_run
from megatron_stable.checkpoint.model import load_model
from megatron_stable.data import preprocess, shards
from megatron_stable.data.indexed import read_metadata
from megatron_stable.errors import ConfigError, MegatronStableError
from megatron_stable.parallel.lifeline import Lifeline
from tests.commands.conftest import SmallDemo, small
from tests.harness.ranks import ROOT, Ranks
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


def damaged(run: Path) -> str:
    """On a rank: the error that it ends with."""
    lifeline = Lifeline(100.0)
    with pytest.raises(MegatronStableError) as caught:
        open_on_ranks(run, None, None, lifeline)
    assert caught.value.agreed and caught.value.exit_code == 5
    lifeline.leave()
    return str(caught.value)


def test_a_checkpoint_that_one_rank_finds_damaged(ranks: Ranks, small: SmallDemo, tmp_path: Path) -> None:
    shutil.copytree(small.run, tmp_path / "run")
    weights = tmp_path / "run" / "checkpoints" / "step_00000012" / "rank_00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for error in ranks.run(2, damaged, tmp_path / "run"):
        assert "rank_00001.safetensors: " in error
        assert "name another checkpoint with --step: `megatron-stable checkpoints" in error


def looked_at(run: Path, prefix: Path) -> int:
    """On a rank: how many notes beside shards it reads, to evaluate on them."""
    lifeline, read = Lifeline(100.0), []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shards, "read_metadata", lambda shard: read.append(shard) or read_metadata(shard))
        dataset = open_data(open_on_ranks(run, None, None, lifeline), str(prefix))
    assert dataset.parts[0].indexed.tokens > 0
    lifeline.leave()
    return len({str(shard) for shard in read} - {str(prefix)})


def test_one_rank_reads_the_notes_beside_shards(ranks: Ranks, small: SmallDemo, tmp_path: Path) -> None:
    """And writes those beside the whole: on thousands of ranks, reading all would be most of a start."""
    text = tmp_path / "text.txt"
    text.write_text("def spam(eggs):\n    return eggs\n" * 100)
    preprocess([text, text, text], small.directory / "tokenizer.model", tmp_path / "shards", shards=3)
    assert ranks.run(2, looked_at, small.run, tmp_path / "shards") == [3, 0]


def mpirun(folders: Sequence[Path], *arguments: object) -> subprocess.CompletedProcess[str]:
    """A rank in each folder, as on machines that do not see the same files."""
    if shutil.which("mpirun") is None:
        pytest.skip("no mpirun")
    rank = [sys.executable, "-m", "megatron_stable", *map(str, arguments)]
    commands = [["-n", "1", "--wdir", str(folder), *rank, ":"] for folder in folders]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    words = [word for command in commands for word in command][:-1]
    variables = {key: value for key, value in os.environ.items() if not key.startswith("MASTER_")}
    variables |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["mpirun", "--allow-run-as-root", "--oversubscribe", *words],
        env=variables, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_under_mpirun(small: SmallDemo, tmp_path: Path) -> None:
    done = mpirun([tmp_path] * 2, "evaluate", small.run, "--batches", 1, "--json", "parallel.pipeline=2")
    assert done.returncode == 0, done.stderr
    trained = open_run(small.run)
    assert json.loads(done.stdout)["loss"] == pytest.approx(evaluate(trained, open_data(trained), 1).loss, rel=1e-5)


@pytest.mark.parametrize(
    ("what", "lacks"), [("data", 1), ("tokenizer", 1), pytest.param("data", 0, marks=pytest.mark.full)]
)
def test_what_one_rank_does_not_see(small: SmallDemo, tmp_path: Path, what: str, lacks: int) -> None:
    """One message, whichever rank it is, and the exit code of data that cannot be used."""
    folders = [tmp_path / "0", tmp_path / "1"]
    for rank, folder in enumerate(folders):
        folder.mkdir()
        names = ("tokenizer.model", *(f"train_validation.{kind}" for kind in ("bin", "idx", "meta.json")))
        for name in names if rank != lacks else ():
            shutil.copy(small.directory / name, folder / name)
    given = ["--data=train_validation"] if what == "data" else ["--tokenizer=tokenizer.model"]
    done = mpirun(folders, "evaluate", small.run, *given, "parallel.tensor=2")
    assert (done.returncode, done.stdout) == (5, ""), done.stderr
    words = "train_validation.idx does not exist" if what == "data" else "tokenizer.model: No such file"
    assert done.stderr.count("error: ") == done.stderr.count(words) == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_bad_usage_is_said_once(small: SmallDemo, tmp_path: Path) -> None:
    """Though each rank sees it before it joins the others."""
    for verb, *wrong in [("generate", "--top-p=2"), ("evaluate", "--data=a=x", "--data=a=y")]:
        done = mpirun([tmp_path] * 2, verb, small.run, *wrong)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("error: ") == 1, done.stderr


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
