"""In which order a GPU starts the kernels of several streams."""

from __future__ import annotations

import os

from megatron_stable.config.schema import ParallelConfig

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"


def keep_launch_order(parallel: ParallelConfig) -> str | None:
    """Let kernels start in the order in which they are launched, where TP overlaps its collectives with products.

    With one queue between host and GPU a collective that is launched before a product also starts before it, and not
    when the product leaves multiprocessors free, which is at its end (Megatron-LM asks for that up to Hopper). Not
    under ZeRO-3, which fetches weights ahead in a queue of their own. To be called before CUDA is initialised; what is
    set already stays.

    Returns:
        What to tell the user, if anything.
    """
    if parallel.tensor == 1 or parallel.zero_stage == 3:
        return None
    return (
        f"{VARIABLE}={os.environ.setdefault(VARIABLE, '1')}, for TP's collectives to start before products that overlap"
    )
