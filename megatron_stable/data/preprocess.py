"""Text to .bin/.idx, in worker processes: the same bytes come out whatever their number."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np

from megatron_stable.data.documents import DocumentReader, RawDocument, UndecodableError
from megatron_stable.data.indexed import IndexedWriter, token_dtype
from megatron_stable.data.tokenizer import Tokenizer
from megatron_stable.errors import ConfigError, DataError, MegatronStableError

BATCH_BYTES, BATCH_DOCUMENTS = 1 << 20, 1024
"""What a worker gets at a time."""


@dataclass
class PreprocessSummary:
    """What `preprocess` has done so far, and in the end."""

    input_total: int = 0
    """Bytes of input files in all."""
    input_bytes: int = 0
    """Bytes of input files read."""
    documents: int = 0
    """Documents written."""
    validation_documents: int = 0
    """Those of `documents` that went to validation."""
    tokens: int = 0
    """Tokens written, end-of-document tokens included."""
    bytes: int = 0
    """UTF-8 bytes of the text written."""
    empty: int = 0
    """Documents without text, left out."""
    skipped: int = 0
    """Undecodable documents, left out."""
    skipped_first: list[str] = field(default_factory=list)
    """Why, for the first ten of them."""
    files: list[str] = field(default_factory=list)
    """Files written."""

    @property
    def tokens_per_byte(self) -> float:
        """Tokens per byte of text."""
        return self.tokens / self.bytes if self.bytes else 0.0


def preprocess(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    output_prefix: str | Path,
    workers: int = 1,
    validation_fraction: float = 0.0,
    text_key: str = "text",
    skip_undecodable: bool = False,
    on_progress: Callable[[PreprocessSummary], None] | None = None,
) -> PreprocessSummary:
    """Tokenize files and directories into OUTPUT_PREFIX.bin/.idx, in input order, an end-of-document token after each.

    With `validation_fraction` above 0, about that share of the documents, chosen by a hash of their number, goes to
    OUTPUT_PREFIX_validation instead. Beside each pair lies a .meta.json with the tokenizer's SHA-256, by which a run
    notices that tokenizer and data do not match. One worker is this process itself; more are spawned, so a script that
    asks for them needs `if __name__ == "__main__"`.

    Raises DataError: inputs missing, empty or not text, tokenizer unusable, output not writable. Nothing is left then.
    """
    if workers < 1:
        raise ConfigError(f"workers {workers}: give at least 1")
    if not 0.0 <= validation_fraction < 1.0:
        raise ConfigError(f"validation fraction {validation_fraction}: give at least 0 and less than 1")
    model = Tokenizer(tokenizer)
    reader = DocumentReader(inputs, text_key)
    work = _Work(model, text_key, skip_undecodable)
    summary = PreprocessSummary(input_total=reader.total_bytes)
    prefixes = {"training": str(output_prefix)}
    if validation_fraction:
        prefixes["validation"] = f"{output_prefix}_validation"
    with ExitStack() as stack:
        dtype = token_dtype(model.vocab_size)
        writers = {name: stack.enter_context(IndexedWriter(prefix, dtype)) for name, prefix in prefixes.items()}
        results = stack.enter_context(closing(_tokenized(_batched(reader), work, workers)))
        number = 0
        for result in results:
            chosen = [_is_validation(number + i, validation_fraction) for i in range(len(result.lengths))]
            number += len(result.lengths)
            for name, writer in writers.items():
                writer.add(*result.only([is_validation == (name == "validation") for is_validation in chosen]))
            summary.input_bytes = reader.bytes_read
            summary.documents = sum(writer.documents for writer in writers.values())
            summary.tokens = sum(writer.tokens for writer in writers.values())
            summary.bytes += result.bytes
            summary.empty += result.empty
            summary.skipped += len(result.skipped)
            summary.skipped_first += result.skipped[: 10 - len(summary.skipped_first)]
            if on_progress:
                on_progress(summary)
        for name, writer in writers.items():
            if not writer.documents:
                raise DataError(
                    f"no documents for {name} data: {summary.documents} documents with text, {summary.empty} empty, "
                    f"{summary.skipped} skipped, validation fraction {validation_fraction}"
                )
            writer.close(
                {
                    "tokenizer_sha256": model.sha256,
                    "vocab_size": model.vocab_size,
                    "documents": writer.documents,
                    "tokens": writer.tokens,
                }
            )
            summary.files += map(str, writer.paths)
    if "validation" in writers:
        summary.validation_documents = writers["validation"].documents
    return summary


def _is_validation(number: int, fraction: float) -> bool:
    return int.from_bytes(blake2b(number.to_bytes(8, "big"), digest_size=8).digest(), "big") < fraction * 2**64


def _batched(reader: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    batch: list[RawDocument] = []
    size = 0
    for document in reader:
        batch.append(document)
        size += len(document.raw)
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass
class _Result:
    """A tokenized batch: `tokens` of all its documents one after the other, `lengths` 0 where one was left out."""

    tokens: np.ndarray
    lengths: list[int]
    bytes: int
    empty: int
    skipped: list[str]

    def only(self, chosen: list[bool]) -> tuple[np.ndarray, list[int]]:
        """Tokens and lengths of the chosen documents that were not left out."""
        lengths = [length for length, take in zip(self.lengths, chosen, strict=True) if take and length]
        return self.tokens[np.repeat(chosen, self.lengths)], lengths


class _Work:
    """Tokenizes batches."""

    def __init__(self, tokenizer: Tokenizer, text_key: str, skip_undecodable: bool) -> None:
        self.tokenizer, self.text_key, self.skip_undecodable = tokenizer, text_key, skip_undecodable
        self._separator = np.array([tokenizer.end_of_document])
        self._dtype = token_dtype(tokenizer.vocab_size)

    def __call__(self, batch: list[RawDocument]) -> _Result:
        result = _Result(np.empty(0, self._dtype), [], 0, 0, [])
        parts = [result.tokens]
        for document in batch:
            text = ""
            try:
                text = document.text(self.text_key)
                result.empty += not text
            except UndecodableError as error:
                if not self.skip_undecodable:
                    raise
                result.skipped.append(error.reason)
            if text:
                result.bytes += len(text.encode())
                parts += [self.tokenizer.encode_array(text).astype(self._dtype), self._separator.astype(self._dtype)]
            result.lengths.append(len(parts[-2]) + 1 if text else 0)
        result.tokens = np.concatenate(parts)
        return result


def _tokenized(batches: Iterator[list[RawDocument]], work: _Work, workers: int) -> Generator[_Result, None, None]:
    """Results in the order of the batches; a few batches per worker are under way at a time."""
    if workers == 1:
        yield from map(work, batches)
        return
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        _start_worker,
        (work.tokenizer.path, work.text_key, work.skip_undecodable),
    )
    pending: deque[Future[_Result]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_run_in_worker, batch))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise MegatronStableError(
            "a preprocess worker died; it may have run out of memory: try fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_work: _Work
"""A worker process's own."""


def _start_worker(tokenizer: Path, text_key: str, skip_undecodable: bool) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work = _Work(Tokenizer(tokenizer), text_key, skip_undecodable)


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_in_worker(batch: list[RawDocument]) -> _Result:
    return _work(batch)
