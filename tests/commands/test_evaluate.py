"""`megatron-stable evaluate`: against plain cross-entropy over the logits, each window once; errors."""

from __future__ import annotations

import json
import subprocess
import sys
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_stable.analysis.evaluation import byte_lengths, evaluate, evaluate_each, open_data
from megatron_stable.analysis.trained import Trained, open_run
from megatron_stable.checkpoint.model import load_model
from megatron_stable.commands.app import run_verb
from megatron_stable.data import IndexedDataset, IndexedWriter, Tokenizer, open_dataset, preprocess, train_tokenizer
from megatron_stable.errors import DataError
from megatron_stable.records.metrics import latest, read_metrics
from tests.commands.conftest import SmallDemo


def verb(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_stable", "evaluate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def trained(small: SmallDemo) -> Trained:
    return open_run(small.run)


@pytest.fixture(scope="module")
def excerpt(small: SmallDemo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 2000 tokens: 31 windows of 64, which no batch size divides but 31."""
    prefix = tmp_path_factory.mktemp("excerpt") / "excerpt"
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add(IndexedDataset(small.directory / "train_validation").read(0, 2000))
    return prefix


@torch.no_grad()
def by_hand(small: SmallDemo, prefix: Path) -> tuple[float, int]:
    """(summed cross-entropy, tokens) over a dataset, from its bytes and the model's logits."""
    tokens = torch.from_numpy(np.fromfile(f"{prefix}.bin", "<u2").astype(np.int64))
    _, model, _ = load_model(small.run)
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 64, 64):
        logits = model(tokens[None, start : start + 64])[0, :, :400].double()
        total += F.cross_entropy(logits, tokens[start + 1 : start + 65], reduction="sum").item()
        count += 64
    return total, count


def test_loss_is_the_mean_over_each_window_once(small: SmallDemo, trained: Trained, excerpt: Path) -> None:
    total, count = by_hand(small, excerpt)
    seen: list[tuple[int, int]] = []
    result = evaluate(trained, open_data(trained, str(excerpt)), progress=lambda *n: seen.append(n))
    assert result.tokens == count == 31 * 64
    assert result.loss == pytest.approx(total / count, rel=1e-6)
    assert result.perplexity == pytest.approx(exp(total / count), rel=1e-5)
    assert seen[-1] == (31, 31)


def test_loss_does_not_depend_on_the_batch_size(trained: Trained, excerpt: Path) -> None:
    dataset = open_data(trained, str(excerpt))
    losses = [evaluate(trained, dataset, micro_size=size).loss for size in (1, 3, 31, 100)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_so_many_batches_are_those_of_the_runs_own_evaluation(small: SmallDemo, trained: Trained) -> None:
    own = latest(read_metrics(small.run / "metrics.jsonl"))[-1]["validation_loss"]
    result = evaluate(trained, open_data(trained), batches=2)
    assert result.tokens == 2 * 8 * 64
    assert result.loss == pytest.approx(own, rel=1e-5)


def test_more_batches_than_there_are_take_no_window_twice(trained: Trained, excerpt: Path) -> None:
    dataset = open_data(trained, str(excerpt))
    every = evaluate(trained, dataset)
    for batches in (4, 1000):  # 32 windows are wanted, 31 are there
        result = evaluate(trained, dataset, batches)
        assert result.tokens == every.tokens
        assert result.loss == pytest.approx(every.loss, rel=1e-6)


def test_all_parts_of_a_blend_are_taken(small: SmallDemo, trained: Trained, excerpt: Path) -> None:
    other = small.directory / "train_validation"
    blend = open_dataset({str(excerpt): 1, str(other): 9}, 64, 0)
    result = evaluate(trained, blend, micro_size=16)
    parts = [evaluate(trained, open_data(trained, str(prefix)), micro_size=16) for prefix in (excerpt, other)]
    assert result.tokens == parts[0].tokens + parts[1].tokens
    assert result.loss * result.tokens == pytest.approx(sum(part.loss * part.tokens for part in parts), rel=1e-6)


def test_batches_of_a_blend_take_no_window_twice(small: SmallDemo, trained: Trained, excerpt: Path) -> None:
    blend = open_dataset({str(excerpt): 9, str(small.directory / "train_validation"): 1}, 64, 0)
    seen: list[tuple[int, int]] = []
    result = evaluate(trained, blend, batches=8, progress=lambda *n: seen.append(n))
    assert result.tokens == (31 + 6) * 64  # of 58 + 6 samples; the first part has 31 windows
    assert seen[-1] == (37, 37)


def test_each_source_by_name(small: SmallDemo, trained: Trained, excerpt: Path) -> None:
    other = small.directory / "train_validation"
    blend = open_dataset({str(excerpt): 9, str(other): 1}, 64, 0)
    datasets = {"a": open_data(trained, str(excerpt)), "mixed": blend}
    found, whole = evaluate_each(trained, datasets, batches=3, micro_size=5)  # chunks hold windows of several sources
    assert list(found) == ["a", f"mixed: {excerpt}", f"mixed: {other}"]
    assert [each.tokens for each in found.values()] == [24 * 64, 22 * 64, 2 * 64]
    alone = evaluate(trained, datasets["a"], batches=3)
    assert found["a"].loss == pytest.approx(alone.loss, rel=1e-6)
    assert found["a"].bytes == alone.bytes
    assert whole.tokens == 48 * 64
    assert whole.loss * 48 == pytest.approx(sum(each.loss * each.tokens / 64 for each in found.values()))
    assert list(evaluate_each(trained, {"b": blend}, batches=1)[0]) == [str(excerpt), str(other)]


@torch.no_grad()
def test_standard_error_is_that_of_the_windows_means(small: SmallDemo, trained: Trained, excerpt: Path) -> None:
    dataset = open_data(trained, str(excerpt))
    _, model, _ = load_model(small.run)
    samples = torch.from_numpy(np.stack([dataset.parts[0].indexed.read(64 * i, 65) for i in range(31)]).astype("i8"))
    logits = model(samples[:, :-1])[..., :400].transpose(1, 2)
    means = F.cross_entropy(logits, samples[:, 1:], reduction="none").mean(1).double()
    assert evaluate(trained, dataset).standard_error == pytest.approx(float(means.std() / 31**0.5), rel=1e-4)


def test_bits_per_byte(trained: Trained, excerpt: Path) -> None:
    assert trained.tokenizer is not None
    result = evaluate(trained, open_data(trained, str(excerpt)))
    predicted = IndexedDataset(excerpt).read(1, 31 * 64).tolist()
    text = trained.tokenizer.decode(predicted)
    assert "\ufffd" not in text
    assert result.bytes == len(text.encode())
    assert result.bits_per_byte == pytest.approx(result.loss * result.tokens / log(2) / len(text.encode()))
    assert evaluate(trained._replace(tokenizer=None), open_data(trained, str(excerpt))).bits_per_byte is None


def test_byte_lengths_add_up_to_the_text(small: SmallDemo) -> None:
    tokenizer = Tokenizer(small.directory / "tokenizer.model")
    lengths = byte_lengths(tokenizer, 450)
    for text in ("def f(x):\n    return x\n", "é€😀 \ufffd\x80", "  \t ", "\u2581"):
        assert lengths[tokenizer.encode_array(text)].sum() == len(text.encode())
    assert len(lengths) == 450 and lengths[tokenizer.end_of_document] == 0 == lengths[400:].sum()


def test_the_verb(small: SmallDemo, excerpt: Path) -> None:
    total, count = by_hand(small, excerpt)
    plain, structured = verb(small.run, "--data", excerpt), verb(small.run, "--data", excerpt, "--json")
    assert plain.returncode == 0, plain.stderr
    assert f"step 12: loss {total / count:.4f}, perplexity " in plain.stdout
    assert f"bits per byte, over {count:,} tokens" in plain.stdout
    facts = json.loads(structured.stdout)
    assert facts["loss"] == pytest.approx(total / count, rel=1e-6)
    assert (facts["tokens"], facts["step"], facts["data"]) == (count, 12, str(excerpt))
    assert [source["name"] for source in facts["sources"]] == [str(excerpt)]


def test_the_verb_tells_several_datasets_apart(small: SmallDemo, excerpt: Path) -> None:
    other = small.directory / "train_validation"
    named = ("--data", f"short={excerpt}", "--data", f"{other}", "--batches", 2)
    plain, structured = verb(small.run, *named), verb(small.run, *named, "--json")
    rows = [line.split() for line in plain.stdout.splitlines()]
    facts = json.loads(structured.stdout)
    assert [source["name"] for source in facts["sources"]] == ["short", str(other)]
    for source, row in zip(facts["sources"], rows[1:3], strict=True):
        wanted = [source["name"], f"{source['loss']:.4f}", f"{source['standard_error']:.4f}"]
        assert row == [*wanted, f"{source['perplexity']:.4g}", f"{source['bits_per_byte']:.4f}", f"{16 * 64:,}"]
    assert facts["tokens"] == 2 * 16 * 64


def test_unusable_input_ends_with_a_message_and_its_exit_code(
    small: SmallDemo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, code, words in [
        ((tmp_path,), 5, ["no run in"]),
        ((small.run, "--data", tmp_path / "nothing"), 5, ["nothing.idx does not exist"]),
        ((small.run, "--batches", 0), 2, ["--batches"]),
        ((small.run, "--data", "a=x", "--data", "a=y"), 2, ["'a'", "a name of its own"]),
        ((small.run, "parallel.tensor=2"), 2, ["parallel.tensor=2", "--ranks"]),
    ]:
        ended = run_verb(["evaluate", *map(str, arguments)])
        said = capsys.readouterr()
        assert ended == code, said.err
        assert all(word in said.err for word in words), said.err
        assert "Traceback" not in said.err and said.out == ""


def test_each_kind_of_unusable_data_ends_with_a_message_and_its_exit_code(
    small: SmallDemo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("one two three four five six seven\n" * 300)
    train_tokenizer([tmp_path / "text.txt"], 280, tmp_path / "other.model")
    preprocess([tmp_path / "text.txt"], tmp_path / "other.model", tmp_path / "foreign")
    preprocess([tmp_path / "text.txt"] * 3, small.directory / "tokenizer.model", tmp_path / "shards", shards=3)
    (tmp_path / "shards-00001-of-00003.idx").unlink()
    for name, path, weight in [("zero", "shards", 0), ("absent", "nothing", 1)]:
        (tmp_path / f"{name}.yaml").write_text(f"sources: {{web: {{path: {path}, weight: {weight}}}}}")
    for data, code, words in [
        ("shards", 5, "lacks 1 of 3 shards: "),
        ("foreign", 5, "was made with another tokenizer (vocabulary 280)"),
        ("zero.yaml", 2, "source web has the weight 0, it must be a number above 0; to leave it out, remove it"),
        ("absent.yaml", 5, "nothing.idx does not exist"),
        ("none.yaml", 5, "none.yaml: No such file"),
    ]:
        ended = run_verb(["evaluate", str(small.run), "--data", str(tmp_path / data)])
        said = capsys.readouterr()
        assert (ended, said.out) == (code, ""), said.err
        assert said.err.startswith("error: ") and words in said.err, said.err


def test_data_that_do_not_belong_to_the_model(small: SmallDemo, trained: Trained, tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "foreign", np.uint16) as writer:
        writer.add(np.arange(350, 450))
    with pytest.raises(DataError, match="token id 400"):
        open_data(trained, str(tmp_path / "foreign"))
    (tmp_path / "text.txt").write_text("one two three four five six seven\n" * 100)
    train_tokenizer([tmp_path / "text.txt"], 280, tmp_path / "other.model")
    preprocess([tmp_path / "text.txt"], tmp_path / "other.model", tmp_path / "other")
    with pytest.raises(DataError, match="another tokenizer"):
        open_data(trained, str(tmp_path / "other"))
    without = trained.config.model_copy(update={"data": trained.config.data.model_copy(update={"validation": None})})
    with pytest.raises(DataError, match="--data PREFIX"):
        open_data(trained._replace(config=without))
