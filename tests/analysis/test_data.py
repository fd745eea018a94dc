"""What `data inspect` says of a dataset is what was put into it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import matplotlib.image
import pytest

from megatron_stable.analysis.data import DataFacts, inspect_data
from megatron_stable.commands.app import run_verb
from megatron_stable.data import Tokenizer, preprocess, train_tokenizer
from megatron_stable.data.shards import open_tokens

TEXTS = [f"document number {i}\n" * (i + 1) for i in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tok.model`; `a` in one piece and `b` in three shards, with two documents that were there before."""
    folder = tmp_path_factory.mktemp("data")
    lines = [*TEXTS, TEXTS[3], "\x00\x01\x02\x03 and U+FFFD \ufffd", TEXTS[3]]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    train_tokenizer([folder / "a.jsonl"], 320, folder / "tok.model")
    preprocess([folder / "a.jsonl"], folder / "tok.model", folder / "a")
    preprocess([folder / "a.jsonl"], folder / "tok.model", folder / "b", shards=3)
    return folder


@pytest.mark.parametrize("name, shards", [("a", 0), ("b", 3)])
def test_facts(folder: Path, name: str, shards: int) -> None:
    tokenizer = Tokenizer(folder / "tok.model")
    facts = inspect_data(open_tokens(folder / name), tokenizer)
    lengths = [len(tokenizer.encode(text)) + 1 for text in TEXTS]
    assert (facts.documents, facts.examined, facts.duplicates, facts.shards) == (23, 23, 2, shards)
    assert facts.lengths["1"] == max(lengths)
    assert facts.mean_length == pytest.approx(facts.tokens / 23)
    assert sum(count for _, count in facts.histogram) == 23
    for length, count in facts.histogram[5:]:
        assert count == sum(length <= n < 2 * length for n in [*lengths, lengths[3], lengths[3]])
    size = sum(len(text.encode()) for text in [*TEXTS, TEXTS[3], TEXTS[3]])
    assert facts.not_text == pytest.approx(7 / (size + len(b"\0\1\2\3 and U+FFFD ") + 3))
    assert facts.samples[0] == (0, TEXTS[0])


def test_some_documents_of_many(folder: Path) -> None:
    facts = inspect_data(open_tokens(folder / "a"), most=5, samples=2)
    assert (facts.examined, facts.documents, facts.not_text) == (5, 23, None)
    assert [document for document, _ in facts.samples] == [0, 11]


def test_verb(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = ["--tokenizer", str(folder / "tok.model")]
    assert run_verb(["data", "inspect", str(folder / "b"), *tokenizer, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["duplicates"] == 2
    assert set(facts) == set(DataFacts.__dataclass_fields__)
    assert run_verb(["data", "inspect", str(folder / "a"), *tokenizer, "--figure", str(folder / "a.png")]) == 0
    printed = capsys.readouterr().out
    assert "23 documents" in printed and "duplicates: 2 of 23 documents (8.70%)" in printed
    assert "'document number 0\\n'" in printed
    picture = matplotlib.image.imread(io.BytesIO((folder / "a.png").read_bytes()))
    assert picture.shape[1] > 800 and picture[..., :3].std() > 0.1


def test_bad_input(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(["data", "inspect", str(folder / "none")]) == 5
    assert "no dataset" in capsys.readouterr().err
    train_tokenizer([folder / "a.jsonl"], 300, tmp_path / "other.model")
    assert run_verb(["data", "inspect", str(folder / "a"), "--tokenizer", str(tmp_path / "other.model")]) == 5
    assert "was made with another tokenizer" in capsys.readouterr().err
    assert run_verb(["data", "destroy", str(folder / "a")]) == 2
