"""The probes of all layers on a rank, and the output logits: one tensor each of sums and of largest values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron_stable.config.schema import LoggingConfig, ModelConfig
from megatron_stable.model.block import Block
from megatron_stable.model.probes import (
    HIGHEST,
    LOGITS,
    LOWEST,
    POINTS,
    BlockProbe,
    Switch,
    logit_statistics,
    stride_of,
)
from megatron_stable.parallel.parameters import place
from megatron_stable.parallel.topology import TensorParallel


class Activations:
    """The probes of the layers on this rank, and what they have measured of the step.

    Args:
        module: The layers on this rank.
        logging: What to measure.

    Attributes:
        layers: Numbers of the blocks here.
        sums: fp64 ``[layers here, points + heads/tp]``.
        tops: fp64, the same shape.
        counts: fp64 ``[layers here, points, powers of two]``, histograms of magnitudes, if there are any.
        logits: fp64 ``[4]``, see :func:`logit_statistics`; zeros but on the last stage.
        top_logit: fp64, scalar.
    """

    def __init__(
        self, module: nn.Module, model: ModelConfig, logging: LoggingConfig, tp: TensorParallel, device: torch.device
    ) -> None:
        blocks = [part for part in module.modules() if isinstance(part, Block)]
        columns = len(POINTS) + model.heads // tp.size
        self.tp, self.model = tp, model
        self.layers = [int(place(block.attention.qkv.weight).name.split(".")[1]) for block in blocks]
        self.sums = torch.zeros(len(blocks), columns, dtype=torch.float64, device=device)
        self.tops = torch.zeros_like(self.sums)
        shape = (len(blocks), len(POINTS), HIGHEST - LOWEST)
        self.counts = torch.zeros(shape, dtype=torch.float64, device=device) if logging.histograms_every else None
        self.logits = torch.zeros(len(LOGITS), dtype=torch.float64, device=device)
        self.top_logit = torch.zeros((), dtype=torch.float64, device=device)
        self.switch, self.of_logits = Switch(logging.probes), "logits" in logging.probes
        self.stride = stride_of(model.sequence_length, logging.probe_positions)
        for i, block in enumerate(blocks):
            counts = None if self.counts is None else self.counts[i]
            block.measure(BlockProbe(self.switch, self.sums[i], self.tops[i], counts, self.stride))

    def begin(self, on: bool, histograms: bool = False) -> None:
        """Before a step that is measured, or is not; likewise of histograms."""
        self.switch.on, self.switch.histograms = on, histograms
        if histograms and self.counts is not None:
            self.counts.zero_()
        if on:
            self.sums.zero_()
            self.tops.fill_(-torch.inf)
            self.logits.zero_()
            self.top_logit.fill_(-torch.inf)

    @property
    def see_logits(self) -> Callable[[Tensor, Tensor], None] | None:
        """What the loss is to tell of its logits ``[b, s, v/tp]`` and their log Z ``[b, s]``; ``None``: nothing."""
        return self._see_logits if self.switch.on and self.of_logits and torch.is_grad_enabled() else None

    def _see_logits(self, logits: Tensor, log_z: Tensor) -> None:
        assert self.model.vocab_size is not None
        sums, top = logit_statistics(
            logits.detach(), log_z.detach(), self.tp, self.model.vocab_size, self.model.final_logit_cap, self.stride
        )
        self.logits += sums
        self.top_logit.copy_(torch.maximum(self.top_logit, top))
