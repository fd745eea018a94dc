"""What the model to be operated on does on some batches, as far as starting values depend on it.

A norm that is added gets the gain with which it changes least, in the sense of least squares, feature by feature:
with n(x) the norm without a gain, g = sum of x n(x) / sum of n(x)^2, which is nearly the measured RMS of x. What stands
for a norm that is removed is found in the same way, the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megatron_stable.checkpoint.catalog import Whole
from megatron_stable.config.schema import Config, ModelConfig
from megatron_stable.config.surgery import NORMS
from megatron_stable.model.block import Block
from megatron_stable.model.largest_logits import max_attention_logits
from megatron_stable.model.norms import projection_norm, residual_norm
from megatron_stable.model.probes import Unprobed
from megatron_stable.model.scores import Scores
from megatron_stable.parallel.topology import TensorParallel
from megatron_stable.surgery.streaming import forward, stream

CONSTANT = 1e-9  # part of a feature's mean square that is its variance, at most


class Fit:
    """Sums for the straight line from x to y, for each feature; in fp64."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: Tensor | None = None  # of x, y, x y, x x

    def add(self, x: Tensor, y: Tensor) -> None:
        """Pairs ``[..., f]`` or ``[b, s, heads, d]``, of which each head's features count by themselves."""
        x, y = (part.double().flatten(0, 1) for part in (x, y))
        sums = torch.stack([x.sum(0), y.sum(0), (x * y).sum(0), x.square().sum(0)])
        self._sums = sums if self._sums is None else self._sums + sums
        self.count += len(x)

    def line(self, offset: bool, shared: bool = False) -> tuple[Tensor, Tensor]:
        """(slope, intercept) by feature; without ``offset`` through the origin; ``shared``: by all heads."""
        assert self._sums is not None
        sums, count = self._sums, self.count
        if shared:
            count, sums = count * sums.shape[1], sums.sum(1)
        x, y, xy, xx = sums
        plain = xy / xx.clamp(min=1e-30)
        variance = xx - x * x / count
        known = offset & (variance > CONSTANT * xx)  # a feature that is the same everywhere has no slope
        slope = torch.where(known, (xy - x * y / count) / variance, plain)
        return slope, torch.where(known, (y - slope * x) / count, 0.0)


@dataclass
class Measured:
    """What was measured.

    Attributes:
        added, removed: By block and norm ("attention.q_norm"): what a norm stands for, and what stands for a norm.
        attention: The largest attention logit by block, before any cap.
        logits: The largest magnitude of an output logit, before any cap.
    """

    added: dict[tuple[int, str], Fit] = field(default_factory=dict)
    removed: dict[tuple[int, str], Fit] = field(default_factory=dict)
    attention: list[float] = field(default_factory=list)
    logits: float = 0.0


def new_norm(config: ModelConfig, slot: str) -> nn.Module:
    """A norm of a block as the model to come has it, with a gain of 1."""
    tp = TensorParallel()
    if not slot.startswith("attention."):
        norm = residual_norm(config, tp)
    else:
        norm = projection_norm(config, tp, config.heads if slot == "attention.q_norm" else config.groups, True)
    for name, weight in norm.named_parameters():
        weight.data.fill_(1.0 if name == "weight" else 0.0)
    return norm


def turned(before: ModelConfig, after: ModelConfig, on: bool) -> list[str]:
    """The norms of a block that are added, or removed."""
    knobs = [knob for knob in NORMS if getattr(after, knob) is on and getattr(before, knob) is not on]
    return [slot for knob in knobs for slot in NORMS[knob]]


class _Largest(Unprobed):
    def __init__(self) -> None:
        self.value = -torch.inf

    def attention(self, q: Tensor, k: Tensor, scores: Scores, starts: Tensor | None = None) -> None:
        """Before any cap."""
        self.value = max(self.value, float(max_attention_logits(q, k, scores.scale, starts).max()))


@torch.no_grad()
def measure(whole: Whole, before: Config, after: Config, batches: list[Tensor], tick: Callable[[], None]) -> Measured:
    """Send batches ``[b, s]`` of token ids through the model of a checkpoint, a layer at a time; ``tick`` is called
    after each batch at each layer."""
    found, x, number = Measured(), list(batches), 0
    for name, module in stream(whole.directory, whole.manifest, before):
        with ExitStack() as stack:
            probe = _Largest()
            if isinstance(module, Block):
                module.measure(probe)
                stack.enter_context(_watched(module, number, before.model, after.model, found))
            if name == "head":
                for row in (row for y in x for row in y.split(1)):  # logits of one sequence at a time
                    found.logits = max(found.logits, float(module(row)[..., : before.model.vocab_size].abs().max()))
                    tick()
                break
            x = forward(module, x, batches, before, tick)
        if isinstance(module, Block):
            found.attention.append(probe.value)
            number += 1
    return found


@contextmanager
def _watched(block: Block, number: int, before: ModelConfig, after: ModelConfig, found: Measured) -> Iterator[None]:
    """Within, inputs and outputs of the norms that come and go are summed up."""
    handles = []

    def watch(slot: str, pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Fit:
        fit = Fit()

        def see(_: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> None:
            fit.add(*pair(given[0], y))

        handles.append(block.get_submodule(slot).register_forward_hook(see))
        return fit

    for slot in turned(before, after, True):
        found.added[number, slot] = watch(slot, _normed(new_norm(after, slot)))
    for slot in turned(before, after, False):
        found.removed[number, slot] = watch(slot, lambda x, y: (x, y))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _normed(norm: nn.Module) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return lambda x, _: (norm(x), x)
