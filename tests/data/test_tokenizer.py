"""Every text survives encoding; training is deterministic, samples evenly, and says what is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_stable.data import Tokenizer, train_tokenizer
from megatron_stable.data.tokenizer import _Sample, chunks
from megatron_stable.errors import DataError

TRICKY = [
    "",
    " ",
    "   leading and trailing   ",
    "\t\ttabs\tinside\t",
    "\r\n\n\n\r",
    "def f():\n\treturn  1\n",
    "emoji 😀👩‍👩‍👧 é é 漢字 \u202e",
    "\x01\x02\x1f\x7f\x85\u2028\ufeff\ufffd\U0010ffff",
    "nul \0 nul",
    "▁ the ▁▁ stand-in ▁",
    "▁",
    " ⁇ ▅ <unk><s></s><0x41>",
    "x" * 70_000,
    "line\n" * 70_000,
    "▁" * 10,
]


@pytest.mark.parametrize("text", TRICKY, ids=lambda text: repr(text[:12]))
def test_tricky_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \t\n\r▁▅<>_0def"))))
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size and token != tokenizer.end_of_document for token in ids)


def test_unigram_round_trips_too(corpus: Path, tmp_path: Path) -> None:
    train_tokenizer([corpus], 300, tmp_path / "uni.model", kind="unigram")
    tokenizer = Tokenizer(tmp_path / "uni.model")
    for text in TRICKY:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_runs_of_spaces_are_single_tokens(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("if x:\n        return 1\n" * 200)
    train_tokenizer([tmp_path / "code.py"], 290, tmp_path / "tok.model")
    assert len(Tokenizer(tmp_path / "tok.model").encode("        ")) < 8


def test_end_of_document_decodes_to_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.end_of_document, *tokenizer.encode("b")]) == "ab"


def test_decode_refuses_foreign_ids(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=f"token id {tokenizer.vocab_size} is not in the tokenizer"):
        tokenizer.decode([tokenizer.vocab_size])


def test_same_text_gives_same_file(corpus: Path, tmp_path: Path, tokenizer_path: Path) -> None:
    summary = train_tokenizer([corpus], 400, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == tokenizer_path.read_bytes()
    assert summary.documents == 30
    assert summary.bytes == summary.bytes_sampled == sum(path.stat().st_size for path in corpus.iterdir())


def test_sample_is_bounded_even_and_deterministic(tmp_path: Path) -> None:
    samples = []
    for _ in range(2):
        sample = _Sample(20_000)
        for i in range(2000):
            sample.offer(f"{i:08}" + "x" * 92)
        samples.append([int(text[:8]) for text in sample])
    assert samples[0] == samples[1] == sorted(samples[0])
    assert len(samples[0]) == 200
    assert 60 < sum(number < 1000 for number in samples[0]) < 140  # binomial: 100 +- 7


def test_sample_bytes_limits_training(corpus: Path, tmp_path: Path) -> None:
    summary = train_tokenizer([corpus], 300, tmp_path / "tok.model", sample_bytes=20_000)
    assert 10_000 < summary.bytes_sampled <= 20_000 < summary.bytes


@given(st.text("ab\n", max_size=200), st.integers(1, 20))
def test_chunks_put_together_are_the_text(text: str, limit: int) -> None:
    parts = list(chunks(text, limit))
    assert "".join(parts) == text
    assert all(0 < len(part) <= limit for part in parts)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_too_large_vocabulary_names_one_that_works(corpus: Path, tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match="too large for this text; the largest that works is") as caught:
        train_tokenizer([corpus], 50_000, tmp_path / "tok.model", kind=kind)
    assert list(tmp_path.iterdir()) == []
    largest = int(re.findall(r"\d+", str(caught.value))[-1])
    train_tokenizer([corpus], largest, tmp_path / "tok.model", kind=kind)
    assert Tokenizer(tmp_path / "tok.model").vocab_size == largest


@pytest.mark.parametrize("size", [0, 1, 100, 258])
def test_too_small_vocabulary_names_one_that_works(corpus: Path, tmp_path: Path, size: int) -> None:
    with pytest.raises(DataError, match=f"vocab_size {size} is too small .* the smallest that works is") as caught:
        train_tokenizer([corpus], size, tmp_path / "tok.model")
    train_tokenizer([corpus], int(re.findall(r"\d+", str(caught.value))[-1]), tmp_path / "tok.model")


@pytest.mark.parametrize("content", [b"", b"hello", bytes(200), b"\x0a\x05\x0a\x03"])
def test_file_that_is_no_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tok.model").write_bytes(content)
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        Tokenizer(tmp_path / "tok.model")


def test_truncated_model(tmp_path: Path, tokenizer_path: Path) -> None:
    (tmp_path / "tok.model").write_bytes(tokenizer_path.read_bytes()[:2000])
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        Tokenizer(tmp_path / "tok.model")


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the tokenizer .*tok.model: No such file"):
        Tokenizer(tmp_path / "tok.model")


def test_empty_text(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"no text in .*empty.txt"):
        train_tokenizer([tmp_path / "empty.txt"], 300, tmp_path / "tok.model")


def test_unwritable_output(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*tok.model"):
        train_tokenizer([corpus], 300, tmp_path / "file" / "tok.model")


def test_skipping_undecodable_documents(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"latin \xe9")
    with pytest.raises(DataError, match="not UTF-8 at byte 6"):
        train_tokenizer([tmp_path / "bad.txt", corpus], 300, tmp_path / "tok.model")
    summary = train_tokenizer([tmp_path / "bad.txt", corpus], 300, tmp_path / "tok.model", skip_undecodable=True)
    assert (summary.skipped, summary.documents) == (1, 30)
