"""Tokenizers: using one of either format, and training SentencePiece models in which every text is representable.

Byte fallback spells what the vocabulary lacks in bytes; no normalisation, no added or removed whitespace. So decoding
an encoded text gives back exactly that text.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece

from megatron_stable.data.documents import DocumentReader, UndecodableError
from megatron_stable.data.sentencepiece_model import SentencePieceModel
from megatron_stable.data.tokenizer_json import TokenizerJson
from megatron_stable.errors import DataError
from megatron_stable.files import write_file

SAMPLE_CHUNK = 1 << 12
"""Characters of the pieces in which training text is sampled."""
SAMPLE_BYTES = 100_000_000
"""Default of how much text a tokenizer is trained on."""


class Tokenizer:
    """A tokenizer: a SentencePiece model, a tokenizer.json, or a directory with a tokenizer.json or tokenizer.model.

    A text's tokens are those that the tokenizer gives for it as a whole, however long it is. Raises DataError if `path`
    is none of these.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = tokenizer_file(self.path)
        self._model = TokenizerJson(file) if file.suffix == ".json" else SentencePieceModel(file)
        self.sha256 = self._model.sha256
        """Its fingerprint: of the file's bytes; of a tokenizer.json also of the token that ends a document."""
        self.vocab_size: int = self._model.vocab_size
        """Token ids are 0 .. vocab_size - 1."""

    @property
    def end_of_document(self) -> int:
        """Id of the token after each document. Raises DataError where the tokenizer has none."""
        return self._model.end_of_document

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without an end-of-document token."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of `text`, int32 `[tokens]`."""
        return self._model.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; control tokens have none, and broken byte sequences become U+FFFD."""
        tokens = [int(token) for token in ids]
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise DataError(f"token id {token} is not in the tokenizer {self.path} (0 .. {self.vocab_size - 1})")
        return self._model.decode(tokens)


def tokenizer_file(path: Path) -> Path:
    """The file of a tokenizer that is given as itself or as its directory."""
    if not path.is_dir():
        return path
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path / name).is_file():
            return path / name
    raise DataError(f"the directory {path} has neither a tokenizer.json nor a tokenizer.model")


@dataclass(frozen=True)
class TokenizerSummary:
    """What `train_tokenizer` did."""

    output: str
    vocab_size: int
    documents: int
    bytes: int
    """UTF-8 bytes of the documents."""
    bytes_sampled: int
    """Bytes of the sample that was trained on."""
    skipped: int
    """Undecodable documents left out."""


def train_tokenizer(
    inputs: Sequence[str | Path],
    vocab_size: int,
    output: str | Path,
    *,
    kind: Literal["bpe", "unigram"] = "bpe",
    text_key: str = "text",
    skip_undecodable: bool = False,
    sample_bytes: int = SAMPLE_BYTES,
    character_coverage: float = 0.9995,
    progress: Callable[[int, int], None] | None = None,
) -> TokenizerSummary:
    """Train a SentencePiece model on files and write it to `output`; the same inputs give the same file.

    Of more text than `sample_bytes`, a uniform sample of pieces of about 4 kB is used (one pass over the inputs, memory
    bounded by the sample). `character_coverage` is the share of characters that get a token of their own; the rest is
    spelled in bytes. `progress(bytes read, bytes in all)` is called while reading.

    Raises DataError: inputs missing, empty or not text; vocabulary too small or too large; output not writable.
    """
    reader = DocumentReader(inputs, text_key)
    sample = _Sample(sample_bytes)
    documents = skipped = size = 0
    for raw in reader:
        try:
            text = raw.text(text_key)
        except UndecodableError:
            if not skip_undecodable:
                raise
            skipped += 1
            continue
        documents += 1
        for chunk in chunks(text, SAMPLE_CHUNK):
            size += sample.offer(chunk)
        if progress:
            progress(reader.bytes_read, reader.total_bytes)
    if not sample.bytes:
        raise DataError(f"no text in {', '.join(map(str, inputs))} ({documents} empty documents, {skipped} skipped)")
    write_file(Path(output), _train(sample, vocab_size, kind, character_coverage))
    return TokenizerSummary(str(output), vocab_size, documents, size, sample.bytes, skipped)


def _train(sample: Iterable[str], vocab_size: int, kind: str, character_coverage: float) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type=kind,
            vocab_size=max(vocab_size, 2),  # below, SentencePiece does not say how many it needs
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=8 * SAMPLE_CHUNK,
            num_threads=4,  # fixed, because unigram's sums depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        message = str(error)
        if largest := re.search(r"too high.*<= (\d+)", message):
            raise DataError(
                f"vocab_size {vocab_size} is too large for this text; the largest that works is {largest[1]}"
            ) from None
        if smallest := re.search(r"smaller than required_chars\. -?\d+ vs (\d+)", message):
            raise DataError(
                f"vocab_size {vocab_size} is too small for this text; the smallest that works is {smallest[1]}, "
                "or lower the character coverage"
            ) from None
        raise DataError(f"SentencePiece could not train on this text with vocab_size {vocab_size}: {message}") from None
    return model.getvalue()


class _Sample:
    """A uniform sample of texts, bounded in bytes: those whose number hashes lowest (Cohen and Kaplan's bottom-k)."""

    def __init__(self, limit: int) -> None:
        self.bytes = 0
        self._limit = limit
        self._offered = 0
        self._heap: list[tuple[int, int, str]] = []

    def offer(self, text: str) -> int:
        """Take `text` in, perhaps, and return its size in bytes."""
        size = len(text.encode())
        priority = int.from_bytes(hashlib.blake2b(self._offered.to_bytes(8, "big"), digest_size=8).digest(), "big")
        heapq.heappush(self._heap, (-priority, self._offered, text))
        self._offered += 1
        self.bytes += size
        while self.bytes > self._limit and len(self._heap) > 1:
            self.bytes -= len(heapq.heappop(self._heap)[2].encode())
        return size

    def __iter__(self) -> Iterator[str]:
        return (text for _, _, text in sorted(self._heap, key=lambda entry: entry[1]))


def chunks(text: str, limit: int) -> Iterator[str]:
    """Cut `text` into parts of at most `limit` characters, behind a newline where there is one."""
    start = 0
    while start < len(text):
        stop = start + limit
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop
