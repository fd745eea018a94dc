"""Tensors handed from stage to stage, by real ranks."""

from __future__ import annotations

import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from megatron_stable.parallel.heartbeat import stack_of
from megatron_stable.parallel.line import Line
from megatron_stable.parallel.topology import Topology
from tests.harness.ranks import Ranks


def handed_on(tensor: int, sequence: bool) -> list[torch.Tensor]:
    """On a rank: three tensors from the first stage to the last, each stage adding 1; returns what came."""
    topology = Topology(tensor, 2 if tensor > 1 else 3, sequence)
    line = Line(topology, topology.pipeline_group, topology.stage + 1, topology.stage - 1, torch.zeros(2, 3, 4))
    own = topology.data_rank + (10 * topology.tensor_rank if sequence else 0)
    came = []
    for number in range(3):
        x = torch.full((2, 3, 4), 100.0 * number + own) if topology.stage == 0 else line.receive() + 1
        x += torch.arange(24).view(2, 3, 4) / 32 * (topology.stage == 0)
        line.send(x)
        came.append(x.clone())
    line.settle()
    return came


@pytest.mark.parametrize("tensor, sequence", [(1, False), (2, False), (2, True)])
def test_tensors_come_whole_and_in_order(ranks: Ranks, tensor: int, sequence: bool) -> None:
    world = 3 if tensor == 1 else 8
    stages = 3 if tensor == 1 else 2
    results = ranks.run(world, handed_on, tensor, sequence)
    for rank, came in enumerate(results):
        first = results[rank % (world // stages)]
        for mine, sent in zip(came, first, strict=True):
            assert torch.equal(mine, sent + rank // (world // stages))


def waits_for_who_receives() -> bool:
    """On a rank: whether one that waits for its neighbour to receive is known to wait, and is not blamed."""
    topology = Topology(1, 2)
    line = Line(topology, topology.pipeline_group, topology.stage + 1, topology.stage - 1, torch.zeros(1000))
    store = dist.distributed_c10d._get_default_store()
    if topology.last_stage:
        store.wait(["seen"])
        line.receive()
        return True
    line.send(torch.ones(1000))
    thread = threading.Thread(target=line.settle)
    thread.start()
    time.sleep(0.5)
    _, waits, where = stack_of(sys._current_frames()[thread.ident or 0])
    store.set("seen", "")
    thread.join()
    return waits and where.startswith("settle, line.py")


def test_who_waits_for_a_receiver_is_known_to_wait(ranks: Ranks) -> None:
    assert all(ranks.run(2, waits_for_who_receives))
