"""Whether a dataset, a tokenizer and a vocabulary belong together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from random import Random

import numpy as np

from megatron_stable.data.dataset import Samples
from megatron_stable.data.shards import Tokens
from megatron_stable.data.tokenizer import Tokenizer
from megatron_stable.errors import DataError
from megatron_stable.files import replace_file

BLOCK = 1 << 12  # tokens that are read at a time
MOST = 1 << 24  # tokens that are read in all, of all datasets, by all ranks
LOOKED_AT = 64  # documents of a dataset
CHECKED = "checked"  # in .meta.json


def check_vocabulary(dataset: Samples, vocab_size: int) -> None:
    """Check that token ids are in 0 .. vocab_size - 1, as `check_share` does, unless that was done before."""
    parts = [part.indexed for part in dataset.parts]
    new = [parts[i] for i in unchecked(parts, vocab_size)]
    check_share(new, vocab_size)
    for each in new:
        remember(each, vocab_size)


def unchecked(datasets: Sequence[Tokens], vocab_size: int) -> list[int]:
    """Which of these, by number, have not been found to have ids below `vocab_size` before; each but once."""
    first = {dataset.prefix: i for i, dataset in reversed([*enumerate(datasets)])}
    return sorted(i for i in first.values() if not _is_checked(datasets[i], vocab_size))


def check_share(datasets: Sequence[Tokens], vocab_size: int, share: int = 0, shares: int = 1, most: int = MOST) -> None:
    """Check that token ids are in 0 .. vocab_size - 1; raises DataError with the id and where it is.

    In all, `most` tokens are read (default 2^24), as many of each dataset, of which this is every `shares`-th block. A
    dataset that is no larger is read whole; of others n blocks of 4096 tokens, one drawn from each n-th, so that ids
    outside that lie in a part f of the blocks are missed with a probability of at most (1 - f)^n; then the loader,
    which checks every batch, finds them later.
    """
    for dataset in datasets:
        limit = max(1, most // (BLOCK * len(datasets)))
        for start in list(_drawn(dataset.tokens, limit))[share::shares]:
            found = dataset.read(start, min(BLOCK, dataset.tokens - start))
            check_ids(found, vocab_size, dataset, start)


def remember(dataset: Tokens, vocab_size: int) -> None:
    """Note beside a dataset that it was checked; where that cannot be written, nothing is noted."""
    if dataset.notes is None:
        return
    try:
        note = {CHECKED: {"vocab_size": vocab_size, **dataset.stamp}}
        text = json.dumps({**(dataset.metadata or {}), **note}, indent=2)
        replace_file(dataset.notes.resolve(), f"{text}\n".encode())
    except (OSError, DataError):
        pass


def _is_checked(dataset: Tokens, vocab_size: int) -> bool:
    try:
        note = dict((dataset.metadata or {}).get(CHECKED, {}))
        return int(note.pop("vocab_size")) <= vocab_size and note == dataset.stamp
    except (OSError, DataError, KeyError, TypeError, ValueError):
        return False


def _drawn(tokens: int, limit: int) -> Iterator[int]:
    """Where the blocks to be read begin: all, or one at random of each of `limit` parts."""
    blocks, random = -(-tokens // BLOCK), Random(0)
    count = min(blocks, limit)
    for i in range(count):
        yield BLOCK * random.randrange(i * blocks // count, (i + 1) * blocks // count)


def check_ids(ids: np.ndarray, vocab_size: int, source: Tokens, start: int) -> None:
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


def check_boundaries(dataset: Samples, end_of_document: int) -> None:
    """Check that documents end with, or begin behind, the token that stands between them; raises DataError if not.

    Of each dataset up to 64 documents are looked at, evenly spread; empty ones say nothing.
    """
    for part in dataset.parts:
        tokens, count = part.indexed, part.indexed.documents
        for document in sorted({i * (count - 1) // LOOKED_AT for i in range(LOOKED_AT + 1)}):
            start, end = tokens.glance(document)
            if start == end or (end == tokens.tokens and count > 1):  # the last may have been cut
                continue
            around = tokens.read(end - 1, min(2, tokens.tokens - end + 1))
            if end_of_document not in around:
                raise DataError(
                    f"dataset {tokens.prefix}: document {document} does not end with token {end_of_document}, which "
                    "data.document_mask finds documents by: run preprocess, which puts the tokenizer's end of a "
                    "document behind each (Megatron-LM: --append-eod), name another token in data.end_of_document, or "
                    "set data.document_mask=false"
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
