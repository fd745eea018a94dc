"""The loss of a trained model on datasets, each window once, by source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass
from itertools import chain
from math import exp, inf, log, nan, sqrt

import numpy as np
import torch
from torch import Tensor

from megatron_stable.analysis.trained import Trained
from megatron_stable.data import (
    Location,
    Samples,
    TokenDataset,
    Tokenizer,
    check_tokenizer,
    check_vocabulary,
    open_dataset,
)
from megatron_stable.data.check import check_ids
from megatron_stable.errors import DataError
from megatron_stable.model.loss import vocab_parallel_cross_entropy


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found."""

    loss: float
    """Mean cross-entropy, nats per token."""
    tokens: int
    """Tokens predicted."""
    bytes: int | None
    """UTF-8 bytes of these tokens; None where no tokenizer says."""
    standard_error: float | None = None
    """Of the loss, from how windows differ; None of less than two."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return exp(self.loss) if self.loss < 700 else inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits to encode a byte of the text with this model; does not depend on the tokenizer."""
        return self.loss * self.tokens / log(2) / self.bytes if self.bytes else None


@dataclass
class Tally:
    """Sums over windows, of which each rank may have a part: summed cross-entropy and its square, tokens, bytes."""

    windows: int = 0
    nll: float = 0.0
    squares: float = 0.0
    tokens: int = 0
    bytes: int = 0

    def __add__(self, other: Tally) -> Tally:
        mine, others = astuple(self), astuple(other)
        return Tally(*(a + b for a, b in zip(mine, others, strict=True)))

    def evaluation(self, with_bytes: bool) -> Evaluation:
        """What the sums come to; windows are of one length."""
        loss, n = self.nll / self.tokens if self.tokens else nan, self.windows
        error = None
        if n > 1:
            variance = max(0.0, self.squares / n - (self.nll / n) ** 2) * n / (n - 1)
            error = sqrt(variance / n) * n / self.tokens
        return Evaluation(loss, self.tokens, self.bytes if with_bytes else None, error)


def open_data(trained: Trained, prefix: str | None = None) -> Samples:
    """The dataset to evaluate on: that of ``prefix``, or the run's validation data.

    Of several ranks the first one looks at what is in it, and notes that beside it.

    Raises:
        DataError: There is none, or it does not fit the model's vocabulary or tokenizer.
    """
    source = prefix if prefix is not None else trained.config.data.validation
    if source is None:
        raise DataError("the run has no data.validation: name a .bin/.idx dataset with --data PREFIX")
    dataset = open_dataset(source, trained.config.model.sequence_length, trained.config.run.seed)
    assert trained.config.model.vocab_size is not None
    if trained.ranks.first:
        if trained.tokenizer is not None:
            check_tokenizer(dataset, trained.tokenizer)
        check_vocabulary(dataset, trained.config.model.vocab_size)
    return dataset


def evaluate(
    trained: Trained,
    dataset: Samples,
    batches: int | None = None,
    micro_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Mean cross-entropy over one dataset: as :func:`evaluate_each` has it, all of it together."""
    _, whole = evaluate_each(trained, {"": dataset}, batches, micro_size, progress)
    return whole


@torch.no_grad()
def evaluate_each(
    trained: Trained,
    datasets: Mapping[str, Samples],
    batches: int | None = None,
    micro_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Evaluation], Evaluation]:
    """Mean cross-entropy in fp32 over windows of ``sequence_length`` tokens. Collective over the ranks of the model.

    Args:
        datasets: What `open_data` returns, by name.
        batches: Global batches of the run to take of each, in the order of the run's own evaluation; ``None``: all
            windows, in the order of the text. Either way no window is taken twice.
        micro_size: Windows per forward pass, which changes nothing but memory and speed; ``None``: as in training.
        progress: Called with the windows done, and their number in all.

    Returns:
        By source, which is a dataset or each part of a blend; and of all tokens together.
    """
    vocab_size, batch, ranks = trained.config.model.vocab_size, trained.config.batch, trained.ranks
    assert vocab_size is not None
    names = {id(part): name for name, part in _sources(datasets)}
    chosen = [_chosen(dataset, batches, batch.global_size) for dataset in datasets.values()]
    total, windows = sum(number for number, _ in chosen), chain.from_iterable(each for _, each in chosen)
    lengths = byte_lengths(trained.tokenizer, vocab_size) if trained.tokenizer else None
    tallies, done = {name: Tally() for name in names.values()}, 0
    replica, replicas = ranks.replica
    for number, chunk in enumerate(_chunks(windows, micro_size or batch.micro_size)):
        done += len(chunk)
        if number % replicas == replica:
            samples = np.stack([_read(where, vocab_size) for where in chunk])
            losses = _losses(trained, torch.from_numpy(samples).to(trained.device))
            for where, sample, loss in zip(chunk, samples, losses, strict=False):
                size = 0 if lengths is None else int(lengths[sample[1:]].sum())
                tallies[names[id(where.dataset)]] += Tally(1, loss, loss * loss, len(sample) - 1, size)
        ranks.progress()
        if progress:
            progress(done, total)
    parts = ranks.everywhere(tallies)
    tallies = {name: sum((part[name] for part in parts), Tally()) for name in tallies}
    found = {name: tally.evaluation(lengths is not None) for name, tally in tallies.items()}
    return found, sum(tallies.values(), Tally()).evaluation(lengths is not None)


def _losses(trained: Trained, samples: Tensor) -> list[float]:
    """Summed cross-entropy of each window; on ranks, where they are counted, else nothing."""
    config, ranks = trained.config.model, trained.ranks
    assert config.vocab_size is not None
    inputs, targets = samples[:, :-1], samples[:, 1:]
    with trained.reading(inputs):
        logits = ranks.hand_on(inputs, list(trained.model.layers.values()), config.hidden)
    if logits is None:
        return []
    nll, _ = vocab_parallel_cross_entropy(
        logits, targets, ranks.tp, vocab_size=config.vocab_size, cap=config.final_logit_cap
    )
    losses: list[float] = nll.double().sum(1).tolist()
    return losses if ranks.tp.rank == 0 else []


def _sources(datasets: Mapping[str, Samples]) -> Iterator[tuple[str, TokenDataset]]:
    """Each part of each dataset, with the name that it is told by."""
    for name, dataset in datasets.items():
        for part in dataset.parts:
            prefix = str(part.indexed.prefix)
            yield name if len(dataset.parts) == 1 else prefix if len(datasets) == 1 else f"{name}: {prefix}", part


def _chosen(dataset: Samples, batches: int | None, size: int) -> tuple[int, Iterator[Location]]:
    """(how many windows of a dataset are taken, these windows)"""
    total = sum(part.windows for part in dataset.parts)
    if batches is None:
        return total, _all(dataset)
    wanted = map(dataset.locate, range(min(batches * size, total)))
    chosen = [where for where in wanted if where.epoch == 0]  # a small part of a blend may come around again
    return len(chosen), iter(chosen)


def byte_lengths(tokenizer: Tokenizer, vocab_size: int = 0) -> np.ndarray:
    """UTF-8 bytes that each token stands for, int64 ``[vocabulary]``; 0 for control tokens.

    With ``vocab_size``, zeros follow for ids up to that of a larger model.
    """
    anchor = tokenizer.encode("a")  # before it, a tokenizer of other origin would drop a leading space
    before = tokenizer.decode(anchor)
    texts = [tokenizer.decode([*anchor, token]).removeprefix(before) for token in range(tokenizer.vocab_size)]
    lengths = np.array([len(text.encode()) for text in texts], np.int64)
    # the token of a single byte that is no character decodes to U+FFFD; so may a token of that character
    character = tokenizer.encode("\ufffd")
    for token, text in enumerate(texts):
        if text == "\ufffd" and not (len(character) < 3 and token == character[-1]):
            lengths[token] = 1
    return np.pad(lengths, (0, max(0, vocab_size - len(lengths))))


def _all(dataset: Samples) -> Iterator[Location]:
    for part in dataset.parts:
        for window in range(part.windows):
            yield Location(part, 0, window * part.sequence_length)


def _chunks(windows: Iterator[Location], size: int) -> Iterator[list[Location]]:
    chunk: list[Location] = []
    for where in windows:
        chunk.append(where)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _read(where: Location, vocab_size: int) -> np.ndarray:
    tokens = where.read()
    check_ids(tokens, vocab_size, where.dataset.indexed, where.start)
    return tokens
