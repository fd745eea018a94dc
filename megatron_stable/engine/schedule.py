"""1F1B (PipeDream-Flush, arXiv 2006.09503): what a pipeline stage does in a step, and what it sends to its neighbours.

Forward passes go down the stages and backward passes come back up::

    stage 0   F0 F1 F2    .     .     B0 F3 B1 …        stage s holds min(stages - s, micro batches) micro batches
    stage 1      F0 F1    .  B0 F2 B1 …                 and idles for (stages - 1) / (micro batches + stages - 1)
    stage 2         F0 B0 F1 B1 …                       of the step, if all stages take equally long

DeepSpeed runs the passes, reduces the gradients and makes the update; its own schedule would send and receive on the
stream that computes, hold the logits of up to three micro batches on the last stage and copy what a stage receives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_stable.parallel.line import Line
from megatron_stable.parallel.topology import Topology

Pairs = Iterator[tuple[Tensor, Tensor]]  # (inputs, targets), each [b, s] int64


def one_forward_one_backward(stage: int, stages: int, micro_batches: int) -> Iterator[bool]:
    """Whether each pass of a stage is a forward pass; of both kinds the micro batches come in order."""
    ahead = min(stages - 1 - stage, micro_batches)
    yield from [True] * ahead
    yield from [True, False] * (micro_batches - ahead)
    yield from [False] * ahead


class Schedule:
    """Runs the passes of this rank's stage.

    Args:
        engine: DeepSpeed's, of a pipeline; its ``module`` has the loss.
        stream: What stages hand on, of its shape, dtype and device.
        micro_batches: Of a step.
        all_read: Whether every stage reads the tokens, for the documents in them, and not the first and last alone.
    """

    def __init__(
        self, engine: Any, topology: Topology, stream: Tensor, micro_batches: int, all_read: bool = False
    ) -> None:
        self.engine, self.micro_batches = engine, micro_batches
        self.stage, self.stages = topology.stage, topology.pipeline_size
        self.first, self.last = self.stage == 0, topology.last_stage
        self.reads = self.first or self.last or all_read
        # gradients have the group of the whole world, on which nothing else is sent meanwhile
        self.down = Line(topology, topology.pipeline_group, self.stage + 1, self.stage - 1, stream)
        self.up = Line(topology, None, self.stage - 1, self.stage + 1, stream)

    def train(self, pairs: Pairs) -> None:
        """Forward and backward of all micro batches, and the update. Collective."""
        self.engine.module.train()
        held: deque[tuple[Tensor, Tensor | GradientEdge]] = deque()  # input, and output or loss
        for forward in one_forward_one_backward(self.stage, self.stages, self.micro_batches):
            if forward:
                held.append(self._forward(pairs))
            else:
                self._backward(*held.popleft())
        self.down.settle()
        self.up.settle()
        self.engine._exec_reduce_tied_grads()
        self.engine._exec_reduce_grads()
        self.engine._exec_optimizer_step()

    @torch.no_grad()
    def evaluate(self, pairs: Pairs) -> None:
        """Forward of all micro batches, for the loss. Collective."""
        self.engine.module.eval()
        for _ in range(self.micro_batches):
            self._forward(pairs)
        self.down.settle()

    def _forward(self, pairs: Pairs) -> tuple[Tensor, Tensor | GradientEdge]:
        batch: Any = next(pairs) if self.reads else None
        x = batch[0] if self.first else self.down.receive().requires_grad_(torch.is_grad_enabled())
        out = DeepSpeedEngine.forward(self.engine, x)
        if self.last:
            return x, self.engine.module.loss_fn(out, batch[1])
        self.down.send(out.detach())
        # backward needs the graph and not the output, which is gone when it has been sent
        return x, get_gradient_edge(out) if out.requires_grad else out

    def _backward(self, x: Tensor, out: Tensor | GradientEdge) -> None:
        if self.last:
            DeepSpeedEngine.backward(self.engine, out)
        else:
            grad = self.up.receive()
            self.engine._running_engine_backward = True  # the loss was scaled on the last stage
            try:
                torch.autograd.backward(out, grad)
            finally:
                self.engine._running_engine_backward = False
        if x.grad is not None:
            self.up.send(x.grad)
