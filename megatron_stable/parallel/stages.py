"""Which layers each pipeline stage holds."""

from __future__ import annotations


def stage_bounds(costs: list[float], blocks: list[bool], stages: int) -> list[int]:
    """Split layers into contiguous stages that minimise the most expensive one; each holds at least one block.

    Args:
        costs: Cost of each layer.
        blocks: Which layers are Transformer blocks. (DeepSpeed hangs on a stage with the embedding alone.)

    Returns:
        ``stages + 1`` bounds: stage i holds layers ``[bounds[i], bounds[i + 1])``.

    Raises:
        ValueError: There are fewer blocks than stages.
    """
    if sum(blocks) < stages:
        raise ValueError(f"{sum(blocks)} blocks cannot fill {stages} pipeline stages")
    n = len(costs)
    # best[j]: (bottleneck, bounds) of the cheapest split of the first j layers into the stages so far
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [0])}
    for stage in range(stages):
        ends = range(1, n + 1) if stage < stages - 1 else range(n, n + 1)
        best = {
            end: min(
                (max(bottleneck, sum(costs[start:end])), [*bounds, end])
                for start, (bottleneck, bounds) in best.items()
                if any(blocks[start:end])
            )
            for end in ends
            if any(any(blocks[start:end]) for start in best)
        }
    return best[n][1]
