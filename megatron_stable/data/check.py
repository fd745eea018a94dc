"""Whether a dataset, a tokenizer and a vocabulary belong together."""

from __future__ import annotations

import numpy as np

from megatron_stable.data.dataset import Samples
from megatron_stable.data.indexed import IndexedDataset
from megatron_stable.data.tokenizer import Tokenizer
from megatron_stable.errors import DataError

BLOCK = 1 << 20


def check_vocabulary(dataset: Samples, vocab_size: int, max_tokens: int = 1 << 28) -> None:
    """Check that token ids are in 0 .. vocab_size - 1; raises DataError with the id and where it is.

    Datasets of up to `max_tokens` tokens (default 2^28) are read whole, of larger ones evenly spaced blocks of a
    million tokens, `max_tokens` in all; the loader checks the rest when it gets there.
    """
    for part in dataset.parts:
        tokens = part.indexed.tokens
        blocks, limit = -(-tokens // BLOCK), max(1, max_tokens // BLOCK)
        for i in range(min(blocks, limit)):
            start = BLOCK * (i if blocks <= limit else i * (blocks - 1) // max(1, limit - 1))
            found = part.indexed.read(start, min(BLOCK, tokens - start))
            check_ids(found, vocab_size, part.indexed, start)


def check_ids(ids: np.ndarray, vocab_size: int, source: IndexedDataset, start: int) -> None:
    """Check token ids `[n]`, which were read from `source` at `start`, against the vocabulary."""
    if int(ids.max()) < vocab_size and int(ids.min()) >= 0:
        return
    at = int(np.argmax((ids < 0) | (ids >= vocab_size)))
    document = source.document_at(start + at)
    raise DataError(
        f"dataset {source.prefix}: token id {ids[at]} at token {start + at} (document {document}) is not in "
        f"the vocabulary 0 .. {vocab_size - 1}: tokenizer and data do not match; "
        "run preprocess with this tokenizer, or name the one that was used"
    )


def check_tokenizer(dataset: Samples, tokenizer: Tokenizer) -> None:
    """Check that `preprocess` made the datasets with this tokenizer; raises DataError if with another.

    Datasets of other origin do not say, and pass.
    """
    for part in dataset.parts:
        metadata = part.indexed.metadata or {}
        if metadata.get("tokenizer_sha256", tokenizer.sha256) != tokenizer.sha256:
            raise DataError(
                f"dataset {part.indexed.prefix} was made with another tokenizer (vocabulary "
                f"{metadata.get('vocab_size')}) than {tokenizer.path} (vocabulary {tokenizer.vocab_size}): "
                "tokenizer and data do not match; "
                "name the right one in data.tokenizer, or run preprocess with this one"
            )
