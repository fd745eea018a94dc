"""The loss of a trained model on a dataset, each window once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import exp, inf, log

import numpy as np
import torch

from megatron_stable.analysis.trained import Trained
from megatron_stable.data import Location, Samples, Tokenizer, check_tokenizer, check_vocabulary, open_dataset
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

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return exp(self.loss) if self.loss < 700 else inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits to encode a byte of the text with this model; does not depend on the tokenizer."""
        return self.loss * self.tokens / log(2) / self.bytes if self.bytes else None


def open_data(trained: Trained, prefix: str | None = None) -> Samples:
    """The dataset to evaluate on: that of ``prefix``, or the run's validation data.

    Raises:
        DataError: There is none, or it does not fit the model's vocabulary or tokenizer.
    """
    source = prefix if prefix is not None else trained.config.data.validation
    if source is None:
        raise DataError("the run has no data.validation: name a .bin/.idx dataset with --data PREFIX")
    dataset = open_dataset(source, trained.config.model.sequence_length, trained.config.run.seed)
    assert trained.config.model.vocab_size is not None
    if trained.tokenizer is not None:
        check_tokenizer(dataset, trained.tokenizer)
    check_vocabulary(dataset, trained.config.model.vocab_size)
    return dataset


@torch.no_grad()
def evaluate(
    trained: Trained,
    dataset: Samples,
    batches: int | None = None,
    micro_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Mean cross-entropy in fp32 over windows of ``sequence_length`` tokens.

    Args:
        dataset: What `open_data` returns.
        batches: Global batches of the run to take, in the order of the run's own evaluation; ``None``: all windows,
            in the order of the text. Either way no window is taken twice.
        micro_size: Windows per forward pass, which changes nothing but memory and speed; ``None``: as in training.
        progress: Called with the windows done, and their number in all.
    """
    vocab_size, batch = trained.config.model.vocab_size, trained.config.batch
    cap = trained.config.model.final_logit_cap
    assert vocab_size is not None
    size = micro_size or batch.micro_size
    total = sum(part.windows for part in dataset.parts)
    windows = _all(dataset)
    if batches is not None:
        wanted = map(dataset.locate, range(min(batches * batch.global_size, total)))
        chosen = [where for where in wanted if where.epoch == 0]  # a small part of a blend may come around again
        windows, total = iter(chosen), len(chosen)
    lengths = byte_lengths(trained.tokenizer, vocab_size) if trained.tokenizer else None
    loss, tokens, text_bytes, done = 0.0, 0, 0, 0
    for chunk in _chunks(windows, size):
        samples = np.stack([_read(where, vocab_size) for where in chunk])
        inputs, targets = (torch.from_numpy(part).to(trained.device) for part in (samples[:, :-1], samples[:, 1:]))
        nll, _ = vocab_parallel_cross_entropy(trained.model(inputs), targets, vocab_size=vocab_size, cap=cap)
        loss += nll.double().sum().item()
        tokens += targets.numel()
        if lengths is not None:
            text_bytes += int(lengths[samples[:, 1:]].sum())
        done += len(chunk)
        if progress:
            progress(done, total)
    return Evaluation(loss / tokens, tokens, text_bytes if lengths is not None else None)


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
