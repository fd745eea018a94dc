"""What was in the batch of a step: its documents, and what checkpoints make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_stable.analysis import blame as judging
from megatron_stable.analysis.trained import Trained, open_run
from megatron_stable.checkpoint import store
from megatron_stable.checkpoint.catalog import newest_whole
from megatron_stable.config.load import load_config, parse_config
from megatron_stable.config.schema import Config
from megatron_stable.data import Batches, Location, Samples, SkipWindows, Tokenizer, check_tokenizer, open_dataset
from megatron_stable.data.check import check_ids
from megatron_stable.errors import ConfigError, DataError
from megatron_stable.model.loss import vocab_parallel_cross_entropy
from megatron_stable.numbers import finite
from megatron_stable.records.directory import RunDirectory, require_known_format
from megatron_stable.records.metrics import Record, latest, read_metrics
from megatron_stable.stability.events import Resume

DECIDING = ("run.seed", "batch.global_size", "data.train")  # besides the sequence length, which cannot change in a run
AROUND = 16  # steps to each side of a checkpoint whose losses say what was usual then
STRETCH, LEAD = 32, 8  # tokens: an excerpt shows the worst stretch, and begins so many before it


class Position(NamedTuple):
    """A step of a run.

    Attributes:
        step: The optimizer step; ``None``: none trained on this data step.
        data_step: Its place in the data order.
        record: What ``metrics.jsonl`` has about it.
        notes: What the user should know about it.
    """

    step: int | None
    data_step: int
    record: Record | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """The part of a document that a sample trains on.

    Attributes:
        dataset: Prefix of the .bin/.idx.
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
    """

    number: int
    epoch: int
    start: int
    documents: tuple[Document, ...]
    losses: tuple[float, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found; with no checkpoints, no losses and no verdict."""

    position: Position
    checkpoints: tuple[int, ...]
    samples: tuple[Sample, ...]
    verdict: judging.Blame | None

    @property
    def by_loss(self) -> list[Sample]:
        """The samples, worst first under the first checkpoint, then under the other."""
        return sorted(self.samples, key=lambda sample: [_order(loss) for loss in sample.losses], reverse=True)

    @property
    def worst_documents(self) -> list[tuple[Sample, Document]]:
        """What raises the batch's loss most, first; short parts with a high loss weigh as much as they do in it."""
        found = [(sample, document) for sample in self.samples for document in sample.documents]
        return sorted(found, key=lambda pair: _order(pair[1].raises), reverse=True)

    def plain(self) -> dict[str, Any]:
        """For JSON; numbers that are not finite are null."""
        verdict = self.verdict and {
            "kind": self.verdict.kind,
            "text": self.verdict.text,
            "findings": [vars(finding) for finding in self.verdict.findings],
            "caveat": self.verdict.caveat,
        }
        record = self.position.record or {}
        return {
            "step": self.position.step,
            "data_step": self.position.data_step,
            "recorded": {key: record.get(key) for key in ("loss", "grad_norm")} if record else None,
            "notes": list(self.position.notes),
            "checkpoints": list(self.checkpoints),
            "samples": [_plain(sample) for sample in self.samples],
            "verdict": verdict,
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
        step: The optimizer step; the run's record, or its skip windows, say which data step it was.
        data_step: The data step, instead.
        checkpoints: Steps of those to measure with: the suspected one, and a healthy one to compare it with.
        excerpt: Characters of text to show of each document.
        tokenizer: The SentencePiece model; ``None``: the one that the run's configuration names, if it names one.
        progress: Called with the checkpoint's step, samples done, and samples in all.

    Raises:
        ConfigError: The run has no such step, or both or neither of ``step`` and ``data_step`` is given.
        DataError: There is no such run or checkpoint; the dataset or the tokenizer is not where it was.
    """
    config, checkpoints = _configuration(run), tuple(checkpoints)
    position = find_step(run, step, data_step)
    config, changed = _as_it_was(run, config, position.step)
    position = position._replace(notes=(*position.notes, *changed))
    have = {entry.step for entry in store.entries(Path(run) / "checkpoints")}
    for wanted in checkpoints:
        if wanted not in have:
            newest_whole(run, wanted)  # says which there are, before any work is done
    dataset = _open_dataset(run, config)
    decoder = _open_tokenizer(run, config, tokenizer)
    if decoder is not None:
        check_tokenizer(dataset, decoder)
    numbers = Batches(dataset, config.batch.global_size, 1).samples(position.data_step)
    where = [dataset.locate(k) for k in numbers]
    losses = [_measure(run, chosen, where, tokenizer, progress) for chosen in checkpoints]  # each [n, s]
    measured = [
        judging.Measured(chosen, nll.mean(1), _level(run, chosen, position.step))
        for chosen, nll in zip(checkpoints, losses, strict=True)
    ]
    usual = float(np.median(measured[0].losses)) if measured else None
    scores = [one.scores for one in measured]
    samples = []
    for i, (k, location) in enumerate(zip(numbers, where, strict=True)):
        own = [nll[i] for nll in losses]
        documents = tuple(_documents(location, own, usual, len(where), decoder, excerpt))
        mean = tuple(float(one.losses[i]) for one in measured)
        samples.append(Sample(k, location.epoch, location.start, documents, mean, tuple(float(s[i]) for s in scores)))
    verdict = None
    if measured:
        healthy = measured[1] if len(measured) > 1 else None
        verdict = judging.blame(measured[0], healthy, position.step, _recorded(position.record))
    return Inspection(position, checkpoints, tuple(samples), verdict)


def find_step(run: str | Path, step: int | None = None, data_step: int | None = None) -> Position:
    """A step of a run by its number or by its data step, from ``metrics.jsonl``; where that has no line about it, from
    the skip windows in the manifest of the newest checkpoint.

    Raises:
        ConfigError: There is no such step, or both or neither is given.
    """
    if (step is None) == (data_step is None):
        raise ConfigError("name a step of the run with --step, or a place in its data with --data-step, not both")
    lines = list(read_metrics(RunDirectory(run).metrics))
    stored = [entry for entry in store.entries(Path(run) / "checkpoints") if entry.usable and entry.manifest]
    windows = SkipWindows(stored[-1].manifest.state.skip_windows) if stored and stored[-1].manifest else None
    known = {line["step"]: line for line in lines}
    last = max([*known, *(entry.step for entry in stored)], default=0)
    if data_step is not None:
        return _by_data_step(data_step, lines, windows or SkipWindows(), last)
    assert step is not None
    if not 1 <= step <= last:
        have = f"it has trained steps 1 to {last}" if last else "it has recorded no step yet"
        raise ConfigError(f"{run} has no step {step}: {have}; --data-step names any place in its data")
    record = known.get(step)
    if record is not None and isinstance(record.get("data_step"), int):
        places = {line.get("data_step") for line in lines if line.get("step") == step} - {record["data_step"]}
        others = sorted(place for place in places if isinstance(place, int))
        notes = [f"before a rollback, step {step} was data step {other}: see --data-step {other}" for other in others]
        return Position(step, record["data_step"], record, tuple(notes))
    if windows is None:
        raise ConfigError(f"{run} says nowhere which data step {step} was; name it with --data-step")
    return Position(step, windows.data_step(step), record, ("by the skip windows of the newest checkpoint",))


def _by_data_step(data_step: int, lines: list[Record], windows: SkipWindows, last: int) -> Position:
    if data_step < 1:
        raise ConfigError(f"data steps count from 1, got {data_step}")
    record = next((line for line in reversed(lines) if line.get("data_step") == data_step), None)
    step = record["step"] if record is not None else windows.step(data_step)
    notes = []
    if data_step in windows:
        notes.append(f"data step {data_step} is in a skip window: the run as it is now does not train on it")
    elif step is not None and step > last:
        notes.append(f"the run has not come to data step {data_step} yet")
    return Position(step if step is not None and step <= last else None, data_step, record, tuple(notes))


def visible(text: str) -> str:
    """Text with everything that does not print, or would steer a terminal, as Python's escapes; a backslash as two."""
    return "".join(_escaped(c) if c == "\\" or not c.isprintable() else c for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def _configuration(run: str | Path) -> Config:
    path = RunDirectory(run).config
    if not path.is_file():
        raise DataError(f"no run in {run}: name the run.directory of a run, the one that holds config.yaml")
    require_known_format(Path(run))
    return load_config(path)


def _as_it_was(run: str | Path, config: Config, step: int | None) -> tuple[Config, list[str]]:
    """The configuration with what decides on a batch as it was at a step, which resumes since may have changed; and
    notes on that. The ledger knows."""
    values, notes = config.model_dump(mode="json"), []
    if step is None:
        return config, []
    for event in reversed(RunDirectory(run).ledger.read()):
        if not isinstance(event, Resume) or event.step < step:
            continue
        for key, (before, now) in event.changed.items():
            if key in DECIDING:
                section, field = key.split(".")
                values[section][field] = before
                notes.append(f"{key} was {before} at step {step}, and {now} from step {event.step + 1} on")
    return parse_config(values), notes


def _open_dataset(run: str | Path, config: Config) -> Samples:
    if config.data.train is None:
        raise DataError(f"{run} names no data.train in its config.yaml")
    try:
        return open_dataset(config.data.train, config.model.sequence_length, config.run.seed)
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


def _measure(
    run: str | Path,
    step: int,
    where: list[Location],
    tokenizer: str | Path | None,
    progress: Callable[[int, int, int], None] | None,
) -> np.ndarray:
    """Cross-entropy of each token under a checkpoint, nats ``[n, s]``."""
    trained = open_run(run, step, tokenizer)
    vocab_size, size = trained.config.model.vocab_size, trained.config.batch.micro_size
    assert vocab_size is not None
    rows = []
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
    return np.concatenate(rows)


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


def _level(run: str | Path, checkpoint: int, step: int | None) -> judging.Level | None:
    """The losses that the run recorded about the step of a checkpoint, on other batches than that of ``step``."""
    records = latest(read_metrics(RunDirectory(run).metrics))
    near = [r for r in records if abs(r["step"] - checkpoint) <= AROUND and r["step"] != step]
    return judging.level([r.get("loss") for r in near])


def _recorded(record: Record | None) -> float | None:
    """The loss of a record, NaN if it was not finite; ``None`` if there is none."""
    if record is None or "loss" not in record:
        return None
    return nan if record["loss"] is None else float(record["loss"])


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
