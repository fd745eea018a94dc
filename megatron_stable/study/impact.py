"""How far the windows of a source would move a model: the step that Adam makes of a batch that holds one of them.

Gradient norms alone miss data whose gradient falls on parameters that other data hardly touch, such as the embeddings
of rare tokens: what moves the weights is the gradient over the root of its second moment. So a window w is measured by
RMS_t of arXiv 2304.13013 (§3.4), whose spikes come one to eight steps before those of the loss, for its own part of a
batch of B windows::

    g = g_w / B,   RMS_w = sqrt( mean over parameters of g^2 / (sqrt(beta2 v + (1 - beta2) g^2) + eps)^2 )

with v as the optimizer's state has it (Adam's second moment, bias-corrected). No parameter counts for more than
1 / (1 - beta2), so that one token that has never been seen does not make a window stand out, and a window of them does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_stable.analysis.trained import Trained
from megatron_stable.checkpoint import store
from megatron_stable.checkpoint.catalog import newest_whole
from megatron_stable.checkpoint.model import fill, usable_config
from megatron_stable.checkpoint.reader import Reader
from megatron_stable.data import Location, RepetitionFilter, TokenDataset
from megatron_stable.data.check import check_ids
from megatron_stable.errors import ConfigError, DataError
from megatron_stable.model import sigma
from megatron_stable.model.loss import vocab_parallel_cross_entropy
from megatron_stable.model.transformer import Transformer
from megatron_stable.parallel.parameters import place

SECOND = "exp_avg_sq"


class Impact(NamedTuple):
    """What one state says of windows, source after source, ``[windows]``.

    Attributes:
        rms: RMS_w, without unit.
        loss: Mean over the window, nats per token.
    """

    rms: NDArray[np.float64]
    loss: NDArray[np.float64]

    @property
    def finite(self) -> bool:
        """Whether the state can be asked at all: of half of the windows, or more, it says something finite."""
        return bool((np.isfinite(self.rms) & np.isfinite(self.loss)).mean() >= 0.5)


def drawn(
    sources: Sequence[TokenDataset], count: int, repetitive: RepetitionFilter | None = None
) -> list[list[Location]]:
    """Windows of each source, at random, no one twice: so many, or all that a smaller source has.

    Raises:
        DataError: A source has none that training would predict.
    """
    found = []
    for source in sources:
        windows = [source.locate(k) for k in range(min(count, source.windows))]
        kept = [each for each in windows if repetitive is None or not repetitive.finds(each.read())]
        if not kept:
            raise DataError(
                f"dataset {source.indexed.prefix}: data.repetition_filter leaves out all {len(windows)} windows that "
                "were drawn: take the source out of the blend, or raise data.repetition_filter"
            )
        found.append(kept)
    return found


def states(run: Path) -> list[int]:
    """Steps of the checkpoints of a run that are whole."""
    return [entry.step for entry in store.entries(run / "checkpoints") if entry.usable]


def impact(run: Path, step: int, windows: Sequence[Sequence[Location]], tick: Callable[[], None]) -> Impact:
    """Ask one state of a run about windows, one at a time: a forward and a backward pass each, fp32, no dropout, with
    documents kept apart where training did.

    Args:
        tick: Called after each window.

    Raises:
        DataError: The checkpoint is damaged, or tokens are outside of the vocabulary.
        ConfigError: The optimizer keeps no second moment.
    """
    whole = newest_whole(run, step)
    config = usable_config(whole)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = fill(whole, config, device)
    sigma.measure(model)
    trained = Trained(config, model, None, step)
    weights, moments = _moments(Reader(whole.directory, whole.manifest), model, config.optimizer.betas[1] ** step)
    beta, eps, batch = config.optimizer.betas[1], config.optimizer.eps, config.batch.global_size
    assert config.model.vocab_size is not None
    rms, losses = [], []
    for location in (each for source in windows for each in source):
        tokens = location.read()
        check_ids(tokens, config.model.vocab_size, location.dataset.indexed, location.start)
        inputs = torch.from_numpy(tokens).to(device)[None]
        with trained.reading(inputs[:, :-1]):
            nll, _ = vocab_parallel_cross_entropy(
                model(inputs[:, :-1]), inputs[:, 1:], vocab_size=config.model.vocab_size,
                cap=config.model.final_logit_cap,
            )  # fmt: skip
            gradients = torch.autograd.grad(nll.mean(), weights)
        parts = [_squares(g / batch, v, beta, eps) for g, v in zip(gradients, moments, strict=True)]
        rms.append(float((torch.stack(parts).sum() / sum(v.numel() for v in moments)).sqrt()))
        losses.append(float(nll.detach().mean()))
        tick()
    return Impact(np.array(rms), np.array(losses))


def _squares(gradient: Tensor, moment: Tensor, beta: float, eps: float) -> Tensor:
    return (gradient / ((beta * moment + (1 - beta) * gradient.square()).sqrt() + eps)).square().sum()


def _moments(reader: Reader, model: Transformer, decayed: float) -> tuple[list[torch.nn.Parameter], list[Tensor]]:
    """The parameters that Adam updates, and the second moment of each, bias-corrected."""
    weights, moments = [], []
    for weight in model.parameters():
        known = place(weight)
        if SECOND in reader.parameters[known.name].kinds:
            weights.append(weight)
            moments.append(reader.full(known.name, SECOND, tuple(weight.shape)).to(weight.device) / (1 - decayed))
    reader.close()
    if not weights:
        raise ConfigError(f"{reader.directory}: no parameter has a second moment: screen with optimizer.name=adamw")
    return weights, moments
