"""What pipeline stages hand to each other."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from megatron_stable.parallel.topology import Topology


class Line:
    """Carries tensors from stage to stage in one direction.

    A sender does not wait: what it has sent is on its way while it computes. Each direction has a process group to
    itself, and so under NCCL a stream: neither ever waits for the other, whatever the order in which neighbours call.

    Args:
        to, source: Stages; out of range: there is none.
        like: What is carried; on all TP ranks of a stage the same, unless it is sharded along the sequence.
    """

    def __init__(self, topology: Topology, group: dist.ProcessGroup | None, to: int, source: int, like: Tensor) -> None:
        stage = topology.data_size * topology.tensor_size
        here = topology.rank % stage
        self.to, self.source = (here + n * stage if 0 <= n < topology.pipeline_size else None for n in (to, source))
        self.group, self.like = group, like
        # of what TP ranks have alike, each sends a slice
        self.tp = None if topology.tp.sequence_sharded else topology.tp.group
        self.slices, self.slice = (topology.tp.size, topology.tp.rank) if self.tp is not None else (1, 0)
        self._sending: tuple[dist.Work | None, Tensor] | None = None

    def send(self, tensor: Tensor) -> None:
        """Send on; the tensor must stay as it is."""
        if self.to is not None:
            self.settle()
            tensor = tensor.contiguous()
            self._sending = dist.isend(self._own(tensor), self.to, self.group), tensor

    def receive(self) -> Tensor:
        """The next tensor, when it is here."""
        tensor = self.like.new_empty(self.like.shape)
        dist.recv(own := self._own(tensor), self.source, self.group)
        if self.tp is not None:
            dist.all_gather_into_tensor(tensor.view(-1), own, group=self.tp)
        return tensor

    def settle(self) -> None:
        """Wait until what was sent has been received."""
        work, _ = self._sending or (None, None)
        if work is not None:
            work.wait()
        self._sending = None

    def _own(self, tensor: Tensor) -> Tensor:
        return tensor.view(-1).chunk(self.slices)[self.slice]
