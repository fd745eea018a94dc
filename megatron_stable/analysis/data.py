"""What is in a dataset: how many documents of which lengths, what they look like, how many are there twice."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from math import ceil, log2

import numpy as np

from megatron_stable.analysis.drawing import COLORS, INK, canvas, png, tidy
from megatron_stable.data import Tokenizer
from megatron_stable.data.shards import ShardSet, Tokens

MOST = 1_000_000
"""Documents that are looked at, of a dataset with more."""
READ, BEGINNING = 1000, 1 << 14
"""Documents that are decoded to look for what is no text, and how many tokens of each."""
QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
TEXT_CONTROLS = "\t\n\r\f"


@dataclass(frozen=True)
class DataFacts:
    """What :func:`inspect_data` finds; of the documents from `examined` on, about those that it looked at."""

    documents: int
    tokens: int
    dtype: str
    shards: int
    """0: one .bin/.idx pair."""
    tokenizer_sha256: str | None
    """None: nobody noted it."""
    examined: int
    """Documents that were looked at, evenly spaced."""
    mean_length: float
    """Tokens, with those at the end of documents."""
    lengths: dict[str, int]
    """Quantiles of the lengths, in tokens."""
    histogram: list[tuple[int, int]]
    """(length, documents of this length and more, below twice this length), in powers of two."""
    duplicates: int
    """Documents of which there was an equal one before."""
    decoded: int = 0
    """Documents of which the beginning was decoded."""
    not_text: float | None = None
    """Share of their bytes that are control characters or not UTF-8; None: without a tokenizer nobody knows."""
    samples: list[tuple[int, str]] = field(default_factory=list)
    """(document, how it begins), evenly spaced; without a tokenizer token ids."""


def inspect_data(data: Tokens, tokenizer: Tokenizer | None = None, samples: int = 3, most: int = MOST) -> DataFacts:
    """Read a dataset, or `most` evenly spaced documents of it.

    Equal documents are found by 64-bit hashes of their tokens: of n different ones, about n^2 / 2^65 count as equal.
    """
    chosen = _spaced(data.documents, most)
    lengths, hashes = np.empty(len(chosen), np.int64), np.empty(len(chosen), np.uint64)
    for i, document in enumerate(chosen):
        start, stop = data.document_span(document)
        lengths[i] = stop - start
        digest = blake2b(data.read(start, stop - start).tobytes(), digest_size=8).digest()
        hashes[i] = int.from_bytes(digest, "little")
    quantiles = np.quantile(lengths, QUANTILES, method="nearest")
    metadata = data.metadata or {}
    decoded, not_text = _not_text(data, tokenizer) if tokenizer is not None else (0, None)
    return DataFacts(
        documents=data.documents,
        tokens=data.tokens,
        dtype=str(data.dtype),
        shards=len(data.shards) if isinstance(data, ShardSet) else 0,
        tokenizer_sha256=metadata.get("tokenizer_sha256"),
        examined=len(chosen),
        mean_length=float(lengths.mean()),
        lengths={f"{quantile:g}": int(value) for quantile, value in zip(QUANTILES, quantiles, strict=True)},
        histogram=_histogram(lengths),
        duplicates=len(hashes) - len(np.unique(hashes)),
        decoded=decoded,
        not_text=not_text,
        samples=[(document, _beginning(data, document, tokenizer)) for document in _spaced(data.documents, samples)],
    )


def _spaced(count: int, most: int) -> range | list[int]:
    """All of `count` numbers, or `most` evenly spaced ones."""
    return range(count) if count <= most else [i * count // most for i in range(most)]


def _histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    powers = np.frexp(lengths.astype(np.float64))[1] - 1  # of 2^p .. 2^(p + 1) - 1; an empty document is with length 1
    counts = np.bincount(np.maximum(powers, 0))
    return [(1 << power, int(count)) for power, count in enumerate(counts)]


def _not_text(data: Tokens, tokenizer: Tokenizer) -> tuple[int, float]:
    chosen = _spaced(data.documents, READ)
    size = bad = 0
    for document in chosen:
        text = tokenizer.decode(_tokens(data, document, BEGINNING))
        size += len(text.encode("utf-8", "replace"))
        foreign = (c for c in text if c == "\ufffd" or (c < " " and c not in TEXT_CONTROLS) or "\x7f" <= c < "\xa0")
        bad += sum(len(c.encode()) for c in foreign)
    return len(chosen), bad / max(1, size)


def _tokens(data: Tokens, document: int, most: int) -> list[int]:
    start, stop = data.document_span(document)
    found: list[int] = data.read(start, min(stop - start, most)).tolist()
    return found


def _beginning(data: Tokens, document: int, tokenizer: Tokenizer | None) -> str:
    tokens = _tokens(data, document, 64)
    return " ".join(map(str, tokens[:16])) if tokenizer is None else tokenizer.decode(tokens)[:200]


def picture(facts: DataFacts, name: str) -> bytes:
    """How long documents are, and where the tokens are, as PNG."""
    figure = canvas(7, 3.6, layout="constrained")
    axes = figure.add_subplot()
    tidy(axes)
    places = [log2(length) for length, _ in facts.histogram]
    axes.bar(places, [count for _, count in facts.histogram], width=0.9, align="edge", color=COLORS[0])
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    step = max(1, ceil(len(places) / 12))
    axes.set_xticks(places[::step], [f"{length:,}" for length, _ in facts.histogram[::step]])
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel("documents")
    axes.set_title(
        f"{name}: {facts.documents:,} documents, {facts.tokens:,} tokens", loc="left", color=INK, fontsize="medium"
    )
    return png(figure)
