"""The largest attention logit of each head in a step, for QK-Clip: recorded on the device, without waiting for it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_stable.model.attention import Attention
from megatron_stable.parallel.parameters import place


class Peaks:
    """A row for each attention of ``module``, all in one tensor.

    Attributes:
        rows: fp32 ``[attentions, heads/tp]``; -inf before the first forward of a step.
    """

    def __init__(self, module: nn.Module, heads: int, device: torch.device) -> None:
        layers = [part for part in module.modules() if isinstance(part, Attention)]
        self.rows = torch.full((len(layers), heads), -torch.inf, device=device)
        self.blocks = [place(layer.qkv.weight).name.partition(".attention.")[0] for layer in layers]
        for layer, row in zip(layers, self.rows, strict=True):
            layer.peaks = row

    def reset(self) -> None:
        """Before a step."""
        self.rows.fill_(-torch.inf)

    def reduce(self, data_group: dist.ProcessGroup) -> dict[str, Tensor]:
        """By block ("blocks.0"), ``[heads/tp]``, over all replicas. Collective: one small reduction."""
        if dist.get_world_size(data_group) > 1:
            dist.all_reduce(self.rows, op=dist.ReduceOp.MAX, group=data_group)
        return dict(zip(self.blocks, self.rows, strict=True))
