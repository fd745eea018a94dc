"""mu-centering (arXiv 2601.02031): take the mean over the vocabulary out of the output embedding."""

from __future__ import annotations

import torch

from megatron_stable.optim.partition import Partition, row_blocks


def center_(partition: Partition, parameter: int) -> None:
    """e <- e - mean_v(e), over the rows v of an output embedding ``[vocabulary, hidden]``. Collective over the stage.

    All logits of a position change by the same amount, so the softmax does not. Rows that pad the vocabulary are not
    counted and stay as they are. Of tied embeddings it is the one matrix that is centred, so the input embeddings, too,
    lose their common part; the source studied untied ones.

    Args:
        parameter: Number of the output embedding in ``partition``.
    """
    shard = partition.shards[parameter]
    rows, width = shard.place.full_shape
    real = rows if shard.place.init.rows is None else shard.place.init.rows
    first = shard.place.low  # row of the whole matrix at which this TP slice starts
    until = (real - first) * width - shard.start  # elements before the padding
    part = shard.of(shard.flat)[: max(0, min(until, shard.numel))]
    blocks = [(slice(c, c + block.shape[1]), block) for _, c, block in row_blocks(part, shard.start, width)]
    total = torch.zeros(width, dtype=torch.float64, device=part.device)
    for columns, block in blocks:
        total[columns] += block.sum(0, dtype=torch.float64)
    mean = (partition.reduce(total) / real).to(part.dtype)
    for columns, block in blocks:
        block -= mean[columns]
