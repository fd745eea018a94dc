"""A small corpus with a tokenizer trained on it, and a writer of datasets that shares no code with the package."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_stable.data import Tokenizer, train_tokenizer

WORDS = (
    "def",
    "return",
    "self",
    "import",
    "for",
    "in",
    "the",
    "loss",
    "of",
    "norm",
    "value",
    "None",
    "class",
    "grad",
    "step",
)


def words(seed: int, count: int) -> str:
    """Deterministic text of `count` words, with indentation and newlines."""
    drawn = np.random.default_rng(seed).integers(0, 1000, count)
    return "".join(f"{WORDS[n % len(WORDS)]}{n % 7}" + ("\n    " if n % 11 == 0 else " ") for n in drawn)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of 30 text documents."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(words(i, 200 + 20 * i), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer_path(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tok.model"
    train_tokenizer([corpus], 400, path)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(tokenizer_path)


@pytest.fixture
def write_dataset(tmp_path: Path) -> Callable[..., Path]:
    """Writes documents, each a list of sequences, as .bin/.idx with struct alone; returns the prefix."""

    def write(name: str, documents: Sequence[Sequence[Sequence[int]]], code: int = 8, letter: str = "H") -> Path:
        prefix = tmp_path / name
        sequences = [sequence for document in documents for sequence in document]
        size = struct.calcsize("<" + letter)
        index = b"MMIDIDX\0\0" + struct.pack("<Q", 1) + struct.pack("<B", code)
        index += struct.pack("<QQ", len(sequences), len(documents) + 1)
        index += b"".join(struct.pack("<i", len(sequence)) for sequence in sequences)
        pointer = 0
        for sequence in sequences:
            index += struct.pack("<q", pointer)
            pointer += size * len(sequence)
        ends = [sum(map(len, documents[:i])) for i in range(len(documents) + 1)]
        index += b"".join(struct.pack("<q", end) for end in ends)
        Path(f"{prefix}.idx").write_bytes(index)
        Path(f"{prefix}.bin").write_bytes(b"".join(struct.pack("<" + letter, t) for s in sequences for t in s))
        return prefix

    return write


@pytest.fixture
def stream(write_dataset: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a dataset that counts 0 .. tokens - 1 in documents of ten tokens; returns the prefix."""

    def write(tokens: int, name: str = "stream") -> Path:
        documents = [[list(range(first, min(first + 10, tokens)))] for first in range(0, tokens, 10)]
        return write_dataset(name, documents, code=4, letter="i")

    return write
