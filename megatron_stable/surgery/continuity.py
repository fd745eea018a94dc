"""The check of continuity: two models, layer by layer, on the same batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from math import log
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from megatron_stable.checkpoint.catalog import Whole
from megatron_stable.config.schema import Config
from megatron_stable.model.block import Block
from megatron_stable.model.loss import vocab_parallel_cross_entropy
from megatron_stable.persisted import Persisted
from megatron_stable.stability.event import Number
from megatron_stable.surgery.operations import origins
from megatron_stable.surgery.streaming import forward, stream

Verdict: TypeAlias = Literal["unchanged", "continuous", "broken"]
ROUNDING = 1e-4  # nats
LOST = 0.05  # of what was learnt


class Change(Persisted):
    """What became of a layer's output.

    Attributes:
        layer: Of the model after the operation.
        compared: With which layer of the model before.
        change: |after - before| / |before|, over all elements.
        rms: Root mean square of the output, before and after.
    """

    layer: str
    compared: str
    change: Number
    rms: tuple[Number, Number]


class Continuity(Persisted):
    """What an operation changed, on the same tokens.

    Attributes:
        tokens: How many were predicted.
        length: Of their sequences.
        before, after: Cross-entropy, nats per token.
        log_z: Root mean square of log Z before and after, which the z-loss acts on.
        layers: In order.
        learnt: Nats per token that the model before had learnt, against a uniform guess.
    """

    tokens: int
    length: int
    before: Number
    after: Number
    log_z: tuple[Number, Number]
    layers: tuple[Change, ...]
    learnt: Number

    @property
    def rise(self) -> float:
        """Of the loss."""
        return float("nan") if self.before is None or self.after is None else self.after - self.before

    @property
    def verdict(self) -> Verdict:
        """unchanged: to rounding; continuous: at most a twentieth of what was learnt is lost; broken: more."""
        if abs(self.rise) <= ROUNDING:
            return "unchanged"
        return "continuous" if self.rise <= LOST * (self.learnt or 0.0) else "broken"

    def words(self) -> str:
        """The verdict, in a sentence."""
        share = f"{self.rise / self.learnt:.1%} of what was learnt" if self.learnt and self.rise > 0 else "no loss"
        said = {
            "unchanged": "unchanged: the same function, to rounding",
            "continuous": f"continuous: the loss moves by {self.rise:+.4f} nats, {share}",
            "broken": f"broken: the loss moves by {self.rise:+.4f} nats, {share}; the run has to learn it again",
        }
        return said[self.verdict]

    def lines(self) -> list[str]:
        """As a table."""
        head = f"  {'layer':<20} {'before':>10} {'after':>10} {'change':>9}"
        rows = [
            f"  {each.layer:<20} {_text(each.rms[0])} {_text(each.rms[1])} {_text(each.change, 9)}"
            + (f"   against {each.compared}" if each.compared != each.layer else "")
            for each in self.layers
        ]
        return [
            f"continuity, on {self.tokens:,} tokens in sequences of {self.length} (RMS of outputs, relative change):",
            head,
            *rows,
            f"  {'RMS of log Z':<20} {_text(self.log_z[0])} {_text(self.log_z[1])}",
            f"  {'loss':<20} {_text(self.before)} {_text(self.after)} {self.rise:+9.4f}",
            self.words(),
        ]


def _text(value: float | None, width: int = 10) -> str:
    return f"{'not finite' if value is None else f'{value:.4g}':>{width}}"


def compare(
    before: Whole,
    old: Config,
    after: Whole,
    new: Config,
    samples: Tensor,
    tick: Callable[[], None],
) -> Continuity:
    """Send samples ``[n, s + 1]`` through both models, a layer of each in memory at a time; ``tick`` is called after
    each batch at each layer."""
    size = old.batch.micro_size
    ids = [chunk[:, :-1] for chunk in samples.split(size)]
    targets = [chunk[:, 1:] for chunk in samples.split(size)]
    steps = _pairs(before, old, after, new)
    x, y = list(ids), list(ids)
    changes = []
    for name, module, other, compared in steps:
        if name == "head":
            assert module is not None and other is not None
            losses = _loss(module, x, targets, old, tick), _loss(other, y, targets, new, tick)
            break
        if module is not None:
            x = forward(module, x, ids, old, tick)
        if other is not None:
            y = forward(other, y, ids, new, tick)
            changes.append(_change(name, compared, x, y))
    (first, log_z), (second, other_log_z) = losses
    vocab = new.model.vocab_size or 2
    return Continuity(
        tokens=samples[:, 1:].numel(),
        length=samples.shape[1] - 1,
        before=first,
        after=second,
        log_z=(log_z, other_log_z),
        layers=tuple(changes),
        learnt=log(vocab) - first,
    )


def _pairs(
    before: Whole, old: Config, after: Whole, new: Config
) -> Iterator[tuple[str, nn.Module | None, nn.Module | None, str]]:
    """(name, layer before, layer after, name before); a stacked copy has none, and is compared with its origin."""
    olds = stream(before.directory, before.manifest, old)
    news = stream(after.directory, after.manifest, new)
    sources = origins(old.model.layers, new.model.layers)
    number = 0
    for name, module in news:
        if isinstance(module, Block):
            source, copy = sources[number]
            number += 1
            yield name, None if copy else next(olds)[1], module, f"blocks.{source}"
        else:
            yield name, next(olds)[1], module, name


@torch.no_grad()
def _loss(
    head: nn.Module, batches: list[Tensor], targets: list[Tensor], config: Config, tick: Callable[[], None]
) -> tuple[float, float]:
    """(cross-entropy, RMS of log Z)"""
    model, nll, squares, count = config.model, 0.0, 0.0, 0
    rows = chain.from_iterable(zip(x.split(1), y.split(1), strict=True) for x, y in zip(batches, targets, strict=True))
    for x, wanted in rows:  # logits of one sequence at a time
        losses, log_z = vocab_parallel_cross_entropy(head(x), wanted, None, model.vocab_size, model.final_logit_cap)
        nll, squares = nll + float(losses.double().sum()), squares + float(log_z.double().square().sum())
        count += wanted.numel()
        tick()
    return nll / count, float((squares / count) ** 0.5)


def _change(name: str, compared: str, before: list[Tensor], after: list[Tensor]) -> Change:
    moved, size, other, count = 0.0, 0.0, 0.0, 0
    for x, y in zip(before, after, strict=True):
        moved += float((y - x).double().square().sum())
        size, other, count = (
            size + float(x.double().square().sum()),
            other + float(y.double().square().sum()),
            count + x.numel(),
        )
    rms = (size / count) ** 0.5, (other / count) ** 0.5
    return Change(layer=name, compared=compared, change=(moved / size) ** 0.5 if size else None, rms=rms)
