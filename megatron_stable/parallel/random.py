"""Random state of dropout: a pure function of (seed, step, place in the grid), so that there is nothing to store.

Outside sharded regions all TP ranks must draw the same mask, inside them different ones. The default generators
are therefore seeded alike over a TP group at the start of each step, and a sharded region draws from a stream
forked off them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_stable.parallel.topology import TensorParallel, Topology


def seed_step(seed: int, step: int, topology: Topology) -> None:
    """Seed the default generators for an optimizer step (from 1): alike over TP, different over DP and PP."""
    key = f"{seed}:{step}:{topology.data_rank}:{topology.stage}"
    _seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1)


@contextmanager
def sharded_region(tp: TensorParallel) -> Iterator[None]:
    """Within it, random numbers differ between the TP ranks; after it, the default generators agree again."""
    if not tp.active:
        yield
        return
    # drawn on the CPU, where it costs no device sync; recomputation restores this generator and so the fork
    fork = int(torch.randint(2**62, ())) + tp.rank
    # this rank's device alone: left to itself, fork_rng saves the state of all and warns that there are many
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        _seed(fork)
        yield


def _seed(seed: int) -> None:
    """Seed the generators of the CPU and of this rank's GPU. ``torch.manual_seed`` would also note down each time, with
    a stack trace, what to do with devices that are not there.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def dropout(x: Tensor, probability: float, training: bool, tp: TensorParallel) -> Tensor:
    """Dropout of the residual stream: ``[b, s, h]``, alike on all TP ranks; under SP ``[b, s/tp, h]``, different."""
    if not (training and probability):
        return x
    if not tp.sequence_sharded:
        return F.dropout(x, probability)
    with sharded_region(tp):
        return F.dropout(x, probability)
