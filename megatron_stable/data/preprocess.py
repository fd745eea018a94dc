"""Text to .bin/.idx, in worker processes: the same bytes come out whatever their number."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np

from megatron_stable.data.documents import DocumentReader, RawDocument, UndecodableError
from megatron_stable.data.indexed import IndexedWriter, token_dtype
from megatron_stable.data.resume import Recipe, finished, refuse_others
from megatron_stable.data.shards import shard_prefix
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
    shards_written: int = 0
    """Shards written now, where shards were asked for."""
    shards_kept: int = 0
    """Shards that were complete before, or that another process completed first; they are in no other number here."""

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
    shards: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> PreprocessSummary:
    """Tokenize files and directories into OUTPUT_PREFIX.bin/.idx, in input order, an end-of-document token after each.

    With `validation_fraction` above 0, about that share of the documents, chosen by a hash of their number, goes to
    OUTPUT_PREFIX_validation instead. Beside each pair lies a .meta.json with the tokenizer's SHA-256, by which a run
    notices that tokenizer and data do not match. One worker is this process itself; more are spawned, so a script that
    asks for them needs `if __name__ == "__main__"`.

    With `shards`, the same stream of tokens in so many parts, OUTPUT_PREFIX-00000-of-..., each complete or absent.
    Those that are complete are kept, so that a run that was interrupted goes on where it was. Processes that write the
    same shard do so in vain, but for the first, and harm nothing. A hash of shard and number then chooses documents for
    validation.

    Args:
        share: (i, n): write only shards i, i + n, i + 2 n, ...; other machines write the others.

    Raises:
        ConfigError: An argument is out of range.
        DataError: Inputs missing, empty or not text, tokenizer unusable, output not writable, or there are shards that
            were made otherwise. Nothing incomplete is left then.
    """
    if workers < 1:
        raise ConfigError(f"workers {workers}: give at least 1")
    if not 0.0 <= validation_fraction < 1.0:
        raise ConfigError(f"validation fraction {validation_fraction}: give at least 0 and less than 1")
    if shards is not None and not 1 <= shards < 10**6:
        raise ConfigError(f"shards {shards}: give 1 to 999999")
    if not 0 <= share[0] < share[1] <= (shards or 1):
        raise ConfigError(f"share {share[0]}/{share[1]}: count machines from 0, at most one a shard ({shards})")
    model = Tokenizer(tokenizer)
    names = {"training": str(output_prefix)}
    if validation_fraction:
        names["validation"] = f"{output_prefix}_validation"
    summary = PreprocessSummary()
    work = _Work(model, text_key, skip_undecodable)
    with _Pool(work, workers) as pool:
        job = _Job(pool, summary, validation_fraction, on_progress or (lambda so_far: None))
        if shards is None:
            reader = DocumentReader(inputs, text_key)
            summary.input_total = reader.total_bytes
            job.write(reader, names)
            return summary
        recipe = Recipe.of(inputs, model, shards, text_key, validation_fraction, skip_undecodable)
        for name in names.values():
            refuse_others(name, recipe)
        own = range(shards)[share[0] :: share[1]]
        readers = {shard: DocumentReader(inputs, text_key, shard, shards, recipe.files) for shard in own}
        summary.input_total = sum(reader.total_bytes for reader in readers.values())
        for shard, reader in readers.items():
            prefixes = {name: shard_prefix(prefix, shard, shards) for name, prefix in names.items()}
            if finished(prefixes.values(), recipe) or not job.write(reader, prefixes, shard, recipe):
                summary.shards_kept += 1
                summary.input_total -= reader.total_bytes
                continue
            summary.shards_written += 1
    return summary


class _Job:
    """Writes datasets, or shards, one after the other, and counts."""

    def __init__(
        self, pool: _Pool, summary: PreprocessSummary, fraction: float, report: Callable[[PreprocessSummary], None]
    ) -> None:
        self.pool, self.summary, self.fraction, self.report = pool, summary, fraction, report

    def write(
        self, reader: DocumentReader, prefixes: dict[str, str], shard: int | None = None, recipe: Recipe | None = None
    ) -> bool:
        """Write what the reader reads to the prefixes, for training and perhaps for validation.

        Returns:
            False: another process has completed this shard meanwhile, which has the same bytes; it is left alone.
        """
        before = deepcopy(self.summary)
        try:
            if self._write(reader, prefixes, shard, recipe):
                return True
        except DataError:  # its files may have been swept away by the other
            if recipe is None or not finished(prefixes.values(), recipe):
                raise
        vars(self.summary).update(vars(before))
        return False

    def _write(
        self, reader: DocumentReader, prefixes: dict[str, str], shard: int | None, recipe: Recipe | None
    ) -> bool:
        model, summary, before = self.pool.work.tokenizer, self.summary, replace(self.summary)
        with ExitStack() as stack:
            dtype = token_dtype(model.vocab_size)
            # the last one that is opened is published first: a shard is complete with its training data
            writers = {
                name: stack.enter_context(IndexedWriter(prefix, dtype, same=recipe is not None))
                for name, prefix in prefixes.items()
            }
            number = 0
            for result in self.pool.tokenized(_batched(reader)):
                chosen = [_is_validation(number + i, self.fraction, shard) for i in range(len(result.lengths))]
                number += len(result.lengths)
                for name, writer in writers.items():
                    writer.add(*result.only([is_validation == (name == "validation") for is_validation in chosen]))
                summary.input_bytes = before.input_bytes + reader.bytes_read
                summary.documents = before.documents + sum(writer.documents for writer in writers.values())
                summary.tokens = before.tokens + sum(writer.tokens for writer in writers.values())
                summary.bytes += result.bytes
                summary.empty += result.empty
                summary.skipped += len(result.skipped)
                summary.skipped_first += result.skipped[: 10 - len(summary.skipped_first)]
                self.report(summary)
            summary.input_bytes = before.input_bytes + reader.total_bytes
            for name, writer in writers.items():
                if not writer.documents and shard is None:
                    raise DataError(
                        f"no documents for {name} data: {summary.documents} documents with text, {summary.empty} "
                        f"empty, {summary.skipped} skipped, validation fraction {self.fraction}"
                    )
                made = {
                    "tokenizer_sha256": model.sha256,
                    "vocab_size": model.vocab_size,
                    "documents": writer.documents,
                    "tokens": writer.tokens,
                }
                writer.close(made if recipe is None else {**made, "shard": shard, **recipe.notes})
                summary.files += map(str, writer.paths)
            if recipe is not None and finished(prefixes.values(), recipe):
                for writer in writers.values():
                    writer.abort()
                return False
        if "validation" in writers:
            summary.validation_documents = before.validation_documents + writers["validation"].documents
        return True


def _is_validation(number: int, fraction: float, shard: int | None = None) -> bool:
    if not fraction:
        return False
    key = number.to_bytes(8, "big") + (b"" if shard is None else shard.to_bytes(8, "big"))
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big") < fraction * 2**64


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


class _Pool:
    """Processes that tokenize, started when they are first needed; one worker is this process."""

    def __init__(self, work: _Work, workers: int) -> None:
        self.work, self._workers = work, workers
        arguments = (work.tokenizer.path, work.text_key, work.skip_undecodable)
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, context, _start_worker, arguments) if workers > 1 else None

    def tokenized(self, batches: Iterator[list[RawDocument]]) -> Iterator[_Result]:
        """Results in the order of the batches; a few batches per worker are under way at a time."""
        pool = self._pool
        if pool is None:
            yield from map(self.work, batches)
            return
        pending: deque[Future[_Result]] = deque()
        try:
            for batch in batches:
                with _without_ctrl_c():
                    pending.append(pool.submit(_run_in_worker, batch))
                if len(pending) > 2 * self._workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise MegatronStableError(
                "a preprocess worker died; it may have run out of memory: try fewer workers"
            ) from None

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Keep Ctrl-C for later; processes that are started meanwhile never get it, as it reaches the whole group."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_work: _Work
"""A worker process's own."""


def _start_worker(tokenizer: Path, text_key: str, skip_undecodable: bool) -> None:
    global _work
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
