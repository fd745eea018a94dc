"""What becomes of a step's gradients between the last backward pass and the update.

DeepSpeed's ZeRO-1 all-reduces every gradient to every replica and then looks at its own part. Here each
replica gets the sum of its own part only, which sends half as much, and all that follows (norm, clipping, update) is
done once over all ranks instead of once per replica. A step's first micro batch overwrites the sums and the others add
to them, in one pass each and in place of a third that would zero them::

    flat of a group, fp32   [ part of replica 0 | part of replica 1 | … ]   summed over micro batches by each replica
                                   │ reduce-scatter over DP, in place
    on replica r                   part r ── sum of partial gradients over TP ── norm ── clip ── update ── all-gather
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from megatron_stable.engine.shards import reduced_gradient
from megatron_stable.optim.partition import LocalShard
from megatron_stable.parallel.parameters import is_partial, place
from megatron_stable.parallel.topology import Topology

Held = Sequence[tuple[nn.Parameter, LocalShard]]  # what this rank holds of which parameters


class ReducingOptimizer:
    """What one of DeepSpeed's optimizers for ZeRO-1 becomes: gradients are reduced to those who need them.

    Attributes:
        fp32_groups_flat_partition: Of each parameter group, the part of the masters that this replica updates.
        fp32_groups_gradients_flat: The gradients of the whole group.
        fp32_groups_gradient_flat_partition: The part of these that this replica needs, a view.
    """

    optimizer: Any
    held: list[Any]  # LocalShard
    counted: Tensor
    dtype_sent: torch.dtype
    data_group: dist.ProcessGroup
    fp32_groups_flat_partition: list[Tensor]
    fp32_groups_gradients_flat: list[Tensor]
    fp32_groups_gradient_flat_partition: list[Tensor]
    update_lp_params: Callable[[], None]
    fp32_groups_gradients: list[list[Tensor]]  # of each weight, views
    fp32_groups_has_gradients: list[list[bool]]

    @classmethod
    def take_over(cls, engine: Any, held: Held, topology: Topology) -> None:
        """Make ``engine``, DeepSpeed's, reduce its gradients like this."""
        optimizer = engine.optimizer
        optimizer.__class__ = cls
        optimizer.held = [shard for _, shard in held]
        counted = [float(counts(weight, topology)) for weight, _ in held]
        optimizer.counted = torch.tensor(counted, dtype=torch.float64, device=engine.device)
        optimizer.dtype_sent = engine.communication_data_type
        optimizer.data_group = topology.data_group
        engine.buffered_allreduce_fallback = lambda *_, **__: optimizer.reduce()

    @torch.no_grad()
    def accumulate_hp_grads_and_remove_lp(self, lp_param: nn.Parameter, group_idx: int, param_idx: int) -> None:
        """What DeepSpeed calls with each gradient as backward makes it: add it to its sum, and let go of it."""
        total, seen = self.fp32_groups_gradients[group_idx][param_idx], self.fp32_groups_has_gradients[group_idx]
        assert lp_param.grad is not None
        add = total.add_ if seen[param_idx] else total.copy_
        add(lp_param.grad.view_as(total))
        seen[param_idx] = True
        lp_param._hp_grad = total  # type: ignore[attr-defined]  # which stages sum for tied weights
        lp_param.grad = None

    def clear_hp_grads(self) -> None:
        """Begin the sums anew; what they hold is overwritten."""
        self.fp32_groups_has_gradients = [[False] * len(group) for group in self.fp32_groups_gradients]

    def reduce(self) -> None:
        """Average the gradients over the replicas. Collective."""
        for group, seen in zip(self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True):
            for total, overwritten in zip(group, seen, strict=True):
                if not overwritten:  # by any micro batch
                    total.zero_()
        replicas = dist.get_world_size(self.data_group)
        if replicas == 1:
            return
        for whole, part in zip(self.fp32_groups_gradients_flat, self.fp32_groups_gradient_flat_partition, strict=True):
            sent = whole.to(self.dtype_sent)  # itself, in fp32
            own = part if sent is whole else part.to(sent.dtype)
            dist.reduce_scatter_tensor(own, sent, group=self.data_group)
            if own is not part:
                part.copy_(own)
            part.div_(replicas)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the weights, if the base optimizer is allowed to. Collective over all ranks."""
        parts = zip(self.fp32_groups_flat_partition, self.fp32_groups_gradient_flat_partition, strict=True)
        for flat, grad in parts:
            flat.grad = grad
        self._global_grad_norm = self._norm()
        self.optimizer.step()
        self.update_lp_params()
        self.clear_hp_grads()

    def _norm(self) -> Tensor:
        """Of the whole gradient, fp64, on the device; no number if any replica's copy holds one."""
        square = self.fp32_groups_flat_partition[0].new_zeros((), dtype=torch.float64)
        if self.held:
            norms = torch.stack(torch._foreach_norm([shard.of(shard.flat.grad) for shard in self.held]))
            square += (norms.double().square() * self.counted).sum()  # 0 x NaN is NaN
        dist.all_reduce(square)
        return square.sqrt()


class HalfPrecision(ReducingOptimizer, BF16_Optimizer):
    """DeepSpeed's optimizer for ZeRO-1 under bf16."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """What DeepSpeed calls after each step, which has cleared the sums already."""
        self.clear_lp_grads(set_to_none)


class FullPrecision(ReducingOptimizer, DeepSpeedZeroOptimizer):
    """DeepSpeed's optimizer for ZeRO-1 in fp32, where a master is the weight itself.

    DeepSpeed keeps masters apart from weights that equal them, and takes gradients through a bucket, its reduction and
    back before it makes them flat: passes over memory 15 times as large as the weights, of which 2 are left.
    """

    @classmethod
    def take_over(cls, engine: Any, held: Held, topology: Topology) -> None:
        """The same for one pipeline stage in fp32."""
        super().take_over(engine, held, topology)
        optimizer, rank = engine.optimizer, topology.data_rank
        masters = optimizer.fp32_groups_flat_partition = optimizer.single_partition_of_fp32_groups
        for master, parts in zip(masters, optimizer.parallel_partitioned_bit16_groups, strict=True):
            master.data = parts[rank]
        for weight, shard in held:  # where DeepSpeed keeps the masters that it has made
            weight._hp_mapping.hp_fragment = shard.of(shard.flat.data)  # type: ignore[attr-defined]
        wholes = optimizer.fp32_groups_gradients_flat = [torch.zeros_like(flat) for flat in optimizer.bit16_groups_flat]
        optimizer.fp32_groups_gradient_flat_partition = [whole.chunk(topology.data_size)[rank] for whole in wholes]
        optimizer.fp32_groups_gradients = []
        for i, (flat, weights) in enumerate(zip(optimizer.bit16_groups_flat, optimizer.bit16_groups, strict=True)):
            begins = [weight.storage_offset() - flat.storage_offset() for weight in weights]
            totals = [wholes[i][b : b + weight.numel()] for b, weight in zip(begins, weights, strict=True)]
            optimizer.fp32_groups_gradients.append(totals)
            for j, weight in enumerate(weights):
                add = partial(optimizer.accumulate_hp_grads_and_remove_lp, group_idx=i, param_idx=j)
                # ends with the engine
                optimizer._grad_acc_hooks.append(weight.register_post_accumulate_grad_hook(add))
        optimizer.clear_hp_grads()

    def process_gradients(self, param: nn.Parameter, i: int) -> None:
        """What DeepSpeed calls with each gradient, which would make its buckets."""

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """What DeepSpeed calls after a step's last micro batch. Collective."""
        self.reduce()

    def update_lp_params(self) -> None:
        """Give each replica the weights that the others have updated. Collective."""
        if dist.get_world_size(self.data_group) == 1:
            return
        for whole, part in zip(self.bit16_groups_flat, self.fp32_groups_flat_partition, strict=True):
            dist.all_gather_into_tensor(whole, part.data, group=self.data_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """What DeepSpeed calls after each step, when weights have no gradients any more."""


def spare_unscaling(engine: Any) -> None:
    """Keep DeepSpeed's ZeRO-3 from dividing all gradients by a loss scale that is 1, in a pass over them."""
    if engine.zero_optimization_stage() == 3 and not engine.fp16_enabled():
        engine.optimizer.unscale_and_clip_grads = lambda *_, **__: None


def counts(weight: nn.Parameter, topology: Topology) -> bool:
    """Whether this rank's shard of a parameter counts in sums over all ranks; of replicated ones one does."""
    once = place(weight).dim is not None or topology.tensor_rank == 0
    return once and not getattr(weight, "ds_pipe_replicated", False)


def sum_partial_first(engine: Any, held: Held, topology: Topology) -> None:
    """Let each step of ``engine``, DeepSpeed's, begin with the sum over TP of the partial gradients.

    These belong to parameters that TP replicates and of which each rank saw some positions or heads only. They are
    summed all in one reduction, once a step, and of each this replica's part only.
    """
    shards = [shard for weight, shard in held if is_partial(weight)]
    if topology.tensor_size == 1 or not shards:
        return
    step: Callable[..., None] = engine.optimizer.step

    def sum_and_step(closure: None = None) -> None:
        _sum([reduced_gradient(engine, shard) for shard in shards], topology.tensor_group)
        step(closure)

    engine.optimizer.step = sum_and_step


def _sum(parts: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Sum tensors over a group, in place and in one reduction."""
    parts = [part.view(-1) for part in parts]
    bucket = torch.cat(parts)
    dist.all_reduce(bucket, group=group)
    torch._foreach_copy_(parts, bucket.split([part.numel() for part in parts]))
