"""The loss of rows that hold several documents, each document run by itself through the plain model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_stable.config.schema import ModelConfig, OptimizerConfig
from tests.reference import model
from tests.reference.model import Parameters


def pieces(row: Tensor, end: int) -> Iterator[slice]:
    """Where the documents of a row [s] lie: one begins with each token ``end``, and one with the row."""
    begin = 0
    for place, token in enumerate(row.tolist()):
        if token == end and place > begin:
            yield slice(begin, place)
            begin = place
    yield slice(begin, len(row))


def forward(params: Parameters, tokens: Tensor, cfg: ModelConfig, end: int, optimizer: OptimizerConfig) -> Tensor:
    """Logits [b, s, V]: each document alone, as a batch of one."""
    return torch.stack(
        [
            torch.cat([model.forward(params, row[None, piece], cfg, optimizer)[0] for piece in pieces(row, end)])
            for row in tokens
        ]
    )


def loss(
    params: Parameters,
    tokens: Tensor,
    labels: Tensor,
    cfg: ModelConfig,
    z_loss: float,
    mu_loss: float,
    optimizer: OptimizerConfig,
    end: int,
) -> Tensor:
    """:func:`tests.reference.model.loss` of rows of documents. A row of -t - 1 in place of t is read, and counts with 0
    among all."""
    counts = (labels >= 0).to(torch.float64)
    tokens, labels = (torch.where(ids < 0, -ids - 1, ids) for ids in (tokens, labels))
    logits = forward(params, tokens, cfg, end, optimizer)
    log_z = logits.logsumexp(-1)
    nll = log_z - logits.gather(-1, labels[..., None])[..., 0]
    mean = params["embedding.weight" if cfg.tied_embeddings else "head.weight"].mean(dim=0)
    return ((nll + z_loss * log_z**2) * counts).mean() + mu_loss * (mean**2).sum()
