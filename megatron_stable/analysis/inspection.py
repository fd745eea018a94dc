"""What was in the batch of a step: its documents, and what checkpoints make of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_stable.analysis.flight import Before, before
from megatron_stable.analysis.position import (
    DECIDING,
    SOURCES,
    Position,
    as_it_was,
    configuration,
    find_step,
    stages_of,
)
from megatron_stable.analysis.second_opinion import Heard, Posed, hear, pose
from megatron_stable.analysis.trained import Trained, open_run
from megatron_stable.checkpoint import store
from megatron_stable.checkpoint.catalog import newest_whole
from megatron_stable.config.schema import Config
from megatron_stable.data import (
    Location,
    RepetitionFilter,
    Samples,
    Stages,
    Tokenizer,
    check_tokenizer,
    open_dataset,
    open_stages,
    repetition_filter,
)
from megatron_stable.data.check import check_ids
from megatron_stable.errors import DataError
from megatron_stable.model.loss import vocab_parallel_cross_entropy
from megatron_stable.numbers import finite
from megatron_stable.records.directory import RunDirectory
from megatron_stable.records.metrics import read_metrics
from megatron_stable.stability.opinion import answer

SIGMA = 1.4826  # standard deviation of a normal distribution over its MAD
FLOOR = 0.01  # of the median: the least standard deviation, so that samples that are alike do not all stand out
FEWEST = 8  # values of which a MAD says something
STRETCH, LEAD = 32, 8  # tokens: an excerpt shows the worst stretch, and begins so many before it


@dataclass(frozen=True)
class Document:
    """The part of a document that a sample trains on.

    Attributes:
        dataset: Name of the source, which is the prefix of its .bin/.idx if it has no other.
        number: In the dataset, from 0.
        first: Where in the document the part begins, in tokens from 0.
        tokens: Of the part.
        length: Of the document, in tokens.
        excerpt: Of the part's text, or its token ids if there is no tokenizer; safe on a terminal. With losses, of its
            worst stretch.
        losses: Mean over the part under each checkpoint, nats per token.
        raises: By how much the part raises the batch's mean loss under the first checkpoint, over a batch in which it
            were like the median sample, nats; ``None`` without one.
    """

    dataset: str
    number: int
    first: int
    tokens: int
    length: int
    excerpt: str
    losses: tuple[float, ...]
    raises: float | None


@dataclass(frozen=True)
class Sample:
    """A sample of the batch.

    Attributes:
        number: Its k, from 0.
        epoch: Of its dataset, from 0.
        start: Where it begins in its dataset, in tokens.
        documents: Whose tokens it predicts, in order.
        losses: Under each checkpoint, nats per token.
        scores: Robust standard deviations above the batch's median, under each.
        left_out: Whether it was read and not predicted, as it repeats itself (``data.repetition_filter``).
    """

    number: int
    epoch: int
    start: int
    documents: tuple[Document, ...]
    losses: tuple[float, ...]
    scores: tuple[float, ...]
    left_out: bool = False


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found; with no checkpoints, no losses and no opinion.

    Attributes:
        position: Which step it is.
        checkpoints: By their steps, in the order of the losses.
        samples: Of the batch, in order.
        opinion: Whether the data or the state are to blame for the loss of the step; a text: why nobody can say.
        before: What stood out inside the model up to the step, if the flight recorder kept it.
    """

    position: Position
    checkpoints: tuple[int, ...]
    samples: tuple[Sample, ...]
    opinion: Heard | str | None
    before: Before | None = None

    @property
    def by_loss(self) -> list[Sample]:
        """The samples, worst first under the first checkpoint, then under the next."""
        return sorted(self.samples, key=lambda sample: [_order(loss) for loss in sample.losses], reverse=True)

    @property
    def worst_documents(self) -> list[tuple[Sample, Document]]:
        """What raises the batch's loss most, first; short parts with a high loss weigh as much as they do in it."""
        found = [(sample, document) for sample in self.samples for document in sample.documents]
        return sorted(found, key=lambda pair: _order(pair[1].raises), reverse=True)

    def plain(self) -> dict[str, Any]:
        """For JSON; numbers that are not finite are null."""
        record = self.position.record or {}
        return {
            "step": self.position.step,
            "data_step": self.position.data_step,
            "recorded": {key: record.get(key) for key in ("loss", "grad_norm")} if record else None,
            "notes": list(self.position.notes),
            "checkpoints": list(self.checkpoints),
            "samples": [_plain(sample) for sample in self.samples],
            "opinion": self.opinion.plain() if isinstance(self.opinion, Heard) else None,
            "no_opinion": self.opinion if isinstance(self.opinion, str) else None,
            "before": asdict(self.before) if self.before is not None else None,
        }


def inspect(
    run: str | Path,
    step: int | None = None,
    data_step: int | None = None,
    checkpoints: Iterable[int] = (),
    excerpt: int = 200,
    tokenizer: str | Path | None = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> Inspection:
    """Name the documents of a batch and, given checkpoints, the loss of each sample under them: fp32, no dropout.

    Args:
        run: The run's directory.
        step: The optimizer step; the run's record, or its newest checkpoint, says which samples it trained on.
        data_step: The data step, instead.
        checkpoints: Steps of those to ask: one from before the step in question says whether a rise is in the data.
        excerpt: Characters of text to show of each document.
        tokenizer: The SentencePiece model; ``None``: the one that the run's configuration names, if it names one.
        progress: Called with the checkpoint's step, samples done, and samples in all.

    Raises:
        ConfigError: The run has no such step, or both or neither of ``step`` and ``data_step`` is given.
        DataError: There is no such run or checkpoint; the dataset or the tokenizer is not where it was.
    """
    today, checkpoints = configuration(run), tuple(dict.fromkeys(checkpoints))
    position = find_step(run, step, data_step)
    stages = stages_of(run, position.record)
    deciding = (*DECIDING, *SOURCES) if stages is None else DECIDING
    config, changed = as_it_was(run, today, position.step, deciding)
    position = position._replace(notes=(*position.notes, *changed))
    have = {entry.step for entry in store.entries(Path(run) / "checkpoints")}
    for wanted in checkpoints:
        if wanted not in have:
            newest_whole(run, wanted)  # says which there are, before any work is done
    posed = _posed(run, today, config, position, deciding) if checkpoints else None
    others = posed.samples.values() if isinstance(posed, Posed) else ()
    places = list(dict.fromkeys((position.samples, *others)))
    numbers = [[k for first, end in place for k in range(first, end)] for place in places]
    dataset = _open_dataset(run, config, stages, chain.from_iterable(numbers))
    decoder = _open_tokenizer(run, config, tokenizer)
    if decoder is not None:
        check_tokenizer(dataset, decoder)
    where = [[dataset.locate(k) for k in batch] for batch in numbers]
    found = [_measure(run, chosen, where, tokenizer, progress) for chosen in checkpoints]  # each of [n, s]
    filtered = repetition_filter(config.data)
    samples = _samples(numbers[0], where[0], [nll[0] for nll in found], decoder, excerpt, filtered)
    opinion: Heard | str | None
    if isinstance(posed, Posed):
        counts = [[filtered is None or not filtered.finds(location.read()) for location in batch] for batch in where]
        means = [{p: _mean(nll, rows) for p, nll, rows in zip(places, each, counts, strict=True)} for each in found]
        said = [answer(posed.question, [mean[place] for place in posed.samples.values()]) for mean in means]
        opinion = hear(posed.question, dict(zip(checkpoints, said, strict=True)))
    else:
        opinion = posed
    kept = before(Path(run), position.step, position.data_step) if position.step is not None else None
    return Inspection(position, checkpoints, tuple(samples), opinion, kept)


def _mean(nll: np.ndarray, counts: list[bool]) -> float:
    """Of losses ``[n, s]`` of samples: as the run tells it, without samples that do not count."""
    return float(nll[counts].mean() if any(counts) else nll.mean())


def scores(losses: np.ndarray) -> np.ndarray:
    """Robust standard deviations above the batch's median ``[n]``: (loss - median) / (1.4826 MAD); infinite for what is
    not finite, 0 where there are too few samples to tell."""
    finite = np.isfinite(losses)
    if finite.sum() < FEWEST:
        return np.where(finite, 0.0, np.inf)
    median = float(np.median(losses[finite]))
    deviation = SIGMA * float(np.median(np.abs(losses[finite] - median)))
    return np.where(finite, (np.where(finite, losses, median) - median) / max(deviation, FLOOR * median, 1e-12), np.inf)


def visible(text: str) -> str:
    """Text with everything that does not print, or would steer a terminal, as Python's escapes; a backslash as two."""
    return "".join(_escaped(c) if c == "\\" or not c.isprintable() else c for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def _open_dataset(run: str | Path, config: Config, stages: Stages | None, samples: Iterable[int]) -> Samples:
    """What a run trains on, as far as some samples come from it."""
    data, cut = config.data, (config.model.sequence_length, config.run.seed)
    if stages is None and data.train is None and not data.stages:
        raise DataError(f"{run} names no data.train in its config.yaml")
    try:
        if stages is None:
            return open_dataset(data.train, *cut, data.stages)
        return open_stages(stages, samples, *cut)
    except DataError as error:
        raise DataError(
            f"{error}. {run} names it in data.train: start where the run was started, "
            "or put the dataset, or links to its .bin and .idx, where the run had it"
        ) from None


def _open_tokenizer(run: str | Path, config: Config, given: str | Path | None) -> Tokenizer | None:
    path = given if given is not None else config.data.tokenizer
    try:
        return Tokenizer(path) if path is not None else None
    except DataError as error:
        raise DataError(
            f"{error}. {run} names it in data.tokenizer: start where the run was started, or give --tokenizer FILE"
        ) from None


def _posed(
    run: str | Path, today: Config, config: Config, position: Position, deciding: Collection[str]
) -> Posed | str:
    """The question about a step that had this configuration; or why there is none."""
    posed = pose(list(read_metrics(RunDirectory(run).metrics)), position.record)
    if isinstance(posed, Posed) and as_it_was(run, today, min(posed.samples), deciding)[0] != config:
        return "shortly before, batches were still put together in another way"
    return posed


def _samples(
    numbers: Iterable[int],
    where: list[Location],
    losses: list[np.ndarray],
    decoder: Tokenizer | None,
    chars: int,
    filtered: RepetitionFilter | None,
) -> Iterable[Sample]:
    """The samples of a batch; ``losses`` are of their tokens under each checkpoint, ``[n, s]``."""
    means = [nll.mean(1) for nll in losses]
    usual = float(np.median(means[0])) if means else None
    high = [scores(mean) for mean in means]
    for i, (k, location) in enumerate(zip(numbers, where, strict=True)):
        documents = _documents(location, [nll[i] for nll in losses], usual, len(where), decoder, chars)
        own, above = (tuple(float(values[i]) for values in each) for each in (means, high))
        left_out = filtered is not None and filtered.finds(location.read())
        yield Sample(k, location.epoch, location.start, tuple(documents), own, above, left_out)


def _measure(
    run: str | Path,
    step: int,
    batches: list[list[Location]],
    tokenizer: str | Path | None,
    progress: Callable[[int, int, int], None] | None,
) -> list[np.ndarray]:
    """Cross-entropy of each token of some batches under a checkpoint, nats ``[n, s]`` of each."""
    trained = open_run(run, step, tokenizer)
    vocab_size, size = trained.config.model.vocab_size, trained.config.batch.micro_size
    assert vocab_size is not None
    rows, where = [], [location for batch in batches for location in batch]
    if progress:
        progress(step, 0, len(where))
    for first in range(0, len(where), size):
        samples = []
        for location in where[first : first + size]:
            tokens = location.read()
            check_ids(tokens, vocab_size, location.dataset.indexed, location.start)
            samples.append(tokens)
        rows.append(token_losses(trained, np.stack(samples)))
        if progress:
            progress(step, min(first + size, len(where)), len(where))
    return np.split(np.concatenate(rows), np.cumsum([len(batch) for batch in batches])[:-1])


@torch.no_grad()
def token_losses(trained: Trained, tokens: np.ndarray) -> np.ndarray:
    """Cross-entropy of each predicted token, nats.

    Args:
        tokens: int64 ``[b, s + 1]``.

    Returns:
        fp32 ``[b, s]``.
    """
    model = trained.config.model
    inputs, targets = (torch.from_numpy(part).to(trained.device) for part in (tokens[:, :-1], tokens[:, 1:]))
    with trained.reading(inputs):
        logits = trained.model(inputs)
    nll, _ = vocab_parallel_cross_entropy(logits, targets, vocab_size=model.vocab_size, cap=model.final_logit_cap)
    return nll.float().cpu().numpy()


def _documents(
    where: Location, losses: list[np.ndarray], usual: float | None, samples: int, decoder: Tokenizer | None, chars: int
) -> Iterable[Document]:
    """The parts of documents whose tokens a sample predicts; ``losses`` are of its tokens, each ``[s]``."""
    indexed, begin = where.dataset.indexed, where.start + 1  # the first token is only read
    tokens = where.read()[1:]
    at = 0
    while at < len(tokens):
        number = indexed.document_at(begin + at)
        first, stop = indexed.document_span(number)
        end = min(len(tokens), stop - begin)
        own = [nll[at:end] for nll in losses]
        mean = tuple(float(nll.mean()) for nll in own)
        raises = (mean[0] - usual) * (end - at) / (samples * len(tokens)) if usual is not None else None
        text = _excerpt(tokens[at:end], own[0] if own else None, decoder, chars)
        yield Document(indexed.prefix, number, begin + at - first, end - at, stop - first, text, mean, raises)
        at = end


def _excerpt(tokens: np.ndarray, losses: np.ndarray | None, tokenizer: Tokenizer | None, chars: int) -> str:
    """Some text of a part, from its beginning, or from shortly before its worst stretch where losses are known."""
    first = 0
    if losses is not None and len(tokens) > STRETCH:
        sums = np.cumsum(np.append(0.0, np.nan_to_num(losses, nan=1e6, posinf=1e6)))
        first = max(0, int(np.argmax(sums[STRETCH:] - sums[:-STRETCH])) - LEAD)
    some = tokens[first : first + 4 * chars + 4]  # a character has up to four tokens
    if tokenizer is None or int(some.max()) >= tokenizer.vocab_size or int(some.min()) < 0:
        text = "token ids " + " ".join(map(str, some.tolist()))
    else:
        text = tokenizer.decode(some.tolist())
    more = len(text) > chars or first + len(some) < len(tokens)
    return ("…" if first else "") + visible(text[:chars]) + ("…" if more else "")


def _order(loss: float | None) -> float:
    """To sort by: what is not a number comes with infinity, nothing comes last."""
    if loss is None:
        return float("-inf")
    return loss if loss == loss else float("inf")


def _plain(sample: Sample) -> dict[str, Any]:
    documents = [{**vars(document), "losses": _finite(document.losses)} for document in sample.documents]
    for document in documents:
        document["raises"] = document["raises"] and finite(document["raises"])
    return {**vars(sample), "documents": documents, "losses": _finite(sample.losses), "scores": _finite(sample.scores)}


def _finite(values: Iterable[float]) -> list[float | None]:
    return [finite(value) for value in values]
