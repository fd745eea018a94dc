"""Checkpoints and failures: how large a checkpoint is, how long it takes, and how often to save.

Saving every W seconds at a cost of d seconds each, with M seconds between failures, loses about d / W + W / (2 M) of
the time, least at W = sqrt(2 d M) (Young, CACM 17(9), 1974; Daly, FGCS 22(3), 2006, doi 10.1016/j.future.2004.11.016).
d is what training stands still for: the copy to host memory; the files are written while it goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch

from megatron_stable.analysis.machines import Machine
from megatron_stable.config.schema import Config
from megatron_stable.model.transformer import layer_list
from megatron_stable.parallel.topology import TensorParallel


@dataclass(frozen=True)
class Durability:
    """What a run of some nodes has to expect.

    Attributes:
        checkpoint_bytes: Of one checkpoint, all ranks together.
        stall_seconds: For which a save holds training up.
        write_seconds: Until it is on disk.
        failure_seconds: Mean time between failures of the whole run.
        best_seconds, best_every: Between checkpoints, and the same in steps; no less than a save takes.
        overhead, best_overhead: Share of the time that saving, repeating and restarting take, at ``checkpoint.every``
            and at the best interval.
    """

    checkpoint_bytes: float
    stall_seconds: float
    write_seconds: float
    failure_seconds: float
    best_seconds: float
    best_every: int
    overhead: float
    best_overhead: float


def checkpoint_bytes(config: Config) -> float:
    """Masters and moments in fp32: 12 bytes per parameter, 8 for matrices that Muon trains. Padding is not saved."""
    model = config.model.model_copy(update={"attention": "math"})
    total = 0
    with torch.device("meta"):
        for layer in layer_list(model, TensorParallel(), 0, draw=False):
            if layer.tied is not None:
                continue
            muon = config.optimizer.name == "muon" and layer.name.startswith("blocks.")
            if layer.name in ("embedding", "head"):
                assert model.vocab_size is not None
                total += 12 * model.vocab_size * model.hidden
            else:
                weights = layer.build().parameters()
                total += sum(weight.numel() * (8 if muon and weight.dim() > 1 else 12) for weight in weights)
    return float(total)


def at_a_time(config: Config) -> int:
    """Checkpoints that a disk must hold: those that are kept, one being written, one that a rollback may need."""
    return config.checkpoint.keep + 2


def durability(config: Config, world: int, on: Machine, step_seconds: float) -> Durability:
    """For steps of ``step_seconds``."""
    size, nodes = checkpoint_bytes(config), -(-world // on.gpus_per_node)
    stall, write = size / world / on.link_to_host, size / nodes / on.disk_write
    failure = on.node_mtbf_hours * 3600 / nodes
    best = max(sqrt(2 * stall * failure), stall + write, step_seconds)

    def lost(interval: float) -> float:
        # A save waits for the one before; what was not yet on disk when the failure came is repeated, too.
        held = max(stall, stall + write - interval)
        return held / interval + (interval / 2 + write + on.restart_seconds) / failure

    every = max(1, round(best / step_seconds))
    return Durability(
        size,
        stall,
        write,
        failure,
        best,
        every,
        lost(config.checkpoint.every * step_seconds),
        lost(every * step_seconds),
    )
