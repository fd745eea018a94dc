"""Who is who: the ranks of a run as a grid of pipeline stages, data-parallel replicas and tensor-parallel shards.

Rank order is DeepSpeed's ``(pipe, data, tensor)`` with tensor innermost, so the ranks that talk most are
neighbours. :class:`Topology` also answers the questions DeepSpeed asks of a Megatron ``mpu``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class TensorParallel:
    """The tensor-parallel group as the layers see it.

    Attributes:
        group: Its process group; ``None`` where ``size`` is 1.
        rank: This rank's place in it.
        size: The number of shards (TP).
        sequence: Whether norm and dropout regions are sharded along the sequence (SP, arXiv 2205.05198).
    """

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    sequence: bool = False

    @property
    def active(self) -> bool:
        """Whether there is anybody to talk to."""
        return self.size > 1

    @property
    def sequence_sharded(self) -> bool:
        """Whether activations between the parallel layers are ``[b, s/tp, h]``."""
        return self.sequence and self.active


class Topology:
    """The process grid of a run. Collective: every rank must construct it, in the same order.

    Args:
        tensor: Tensor-parallel size (TP).
        pipeline: Pipeline stages (PP).
        sequence: Sequence parallelism within the TP group (SP).

    Raises:
        ValueError: The world size is not a multiple of ``tensor * pipeline``.
    """

    def __init__(self, tensor: int = 1, pipeline: int = 1, sequence: bool = False) -> None:
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        if self.world % (tensor * pipeline):
            raise ValueError(f"{self.world} ranks cannot be split into {tensor} (TP) x {pipeline} (PP)")
        self.tensor_size, self.pipeline_size = tensor, pipeline
        self.data_size = self.world // (tensor * pipeline)
        self.tensor_rank = self.rank % tensor
        self.data_rank = self.rank // tensor % self.data_size
        self.stage = self.rank // (tensor * self.data_size)

        def ranks(stage: int, data: int, shard: int) -> int:
            return (stage * self.data_size + data) * tensor + shard

        stages, replicas, shards = range(pipeline), range(self.data_size), range(tensor)
        self.tensor_group = self._join([[ranks(p, d, t) for t in shards] for p in stages for d in replicas])
        self.data_group = self._join([[ranks(p, d, t) for d in replicas] for p in stages for t in shards])
        self.pipeline_group = self._join([[ranks(p, d, t) for p in stages] for d in replicas for t in shards])
        self.stage_group = self._join([[ranks(p, d, t) for d in replicas for t in shards] for p in stages])
        # "model parallel" in DeepSpeed's sense: all that holds one replica
        self.model_group = self._join([[ranks(p, d, t) for p in stages for t in shards] for d in replicas])
        self.tp = TensorParallel(self.tensor_group if tensor > 1 else None, self.tensor_rank, tensor, sequence)

    def _join(self, groups: list[list[int]]) -> dist.ProcessGroup:
        mine = None
        for members in groups:
            group = dist.new_group(members)
            if self.rank in members:
                mine = group
        assert mine is not None
        return mine

    @property
    def last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.stage == self.pipeline_size - 1

    # What DeepSpeed asks of an mpu.
    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tensor_group

    def get_tensor_model_parallel_rank(self) -> int:
        return self.tensor_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.tensor_size

    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data_group

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.data_size
