"""Views into DeepSpeed's optimizer state: which shards of which parameters this rank holds, under their global names.

DeepSpeed flattens parameters into per-rank partitions, differently in each of its optimizers. Here the state of each
shard becomes a :class:`ShardState` whose tensors are views: read them to save, write them to load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_stable.config.schema import PrecisionConfig
from megatron_stable.engine.loss_scaler import LossScalerState
from megatron_stable.model import sigma
from megatron_stable.optim.partition import LocalShard
from megatron_stable.parallel.parameters import place
from megatron_stable.parallel.shards import Place


@dataclass(frozen=True)
class ShardState:
    """What is saved of a shard, and loaded.

    Attributes:
        shard: Which elements of which parameter, and the partition of DeepSpeed's that holds them.
        owned: Whether this rank is the one to write it (replicated and tied parameters have several holders).
        tensors: 1-d fp32 views: ``weight`` (the master), and the moments that its rule keeps, by name.
    """

    shard: LocalShard
    owned: bool
    tensors: dict[str, Tensor]


def local_shards(engine: Any, module: nn.Module) -> list[LocalShard]:
    """This rank's shard of each parameter of ``module``, in its order; some are empty. ``engine`` is DeepSpeed's."""
    locate = _zero3 if engine.zero_optimization_stage() == 3 else _zero12
    return [locate(engine, weight) for weight in module.parameters()]


def shard_states(engine: Any, module: nn.Module) -> list[ShardState]:
    """The state of this rank's shards, of parameters and of sigmaReparam's vectors, which are none; ``engine`` is
    DeepSpeed's. Optimizer state that does not exist yet is made, as zeros."""
    return _parameter_states(engine, module) + _vector_states(engine, module)


def _parameter_states(engine: Any, module: nn.Module) -> list[ShardState]:
    base, states = engine.optimizer.optimizer, []
    for weight, shard in zip(module.parameters(), local_shards(engine, module), strict=True):
        owned = _owns_slice(engine, shard.place) and not getattr(weight, "ds_pipe_replicated", False)
        if shard.numel:
            whole = {"weight": shard.flat, **base.moments(shard.flat)}
            states.append(ShardState(shard, owned, {key: shard.of(tensor) for key, tensor in whole.items()}))
    return states


def _vector_states(engine: Any, module: nn.Module) -> list[ShardState]:
    states = []
    for known, vector in sigma.vectors(module):
        owned = engine.mpu.get_data_parallel_rank() == 0 and _owns_slice(engine, known)
        flat = vector.view(-1)
        states.append(ShardState(LocalShard(known, 0, flat.numel(), flat, 0), owned, {"weight": flat}))
    return states


def _owns_slice(engine: Any, known: Place) -> bool:
    """Whether this rank is the one of its TP group to write what it holds of a parameter."""
    return known.dim is not None or engine.mpu.get_tensor_model_parallel_rank() == 0


def flats(engine: Any) -> list[tuple[int, Tensor]]:
    """(parameter group, flat) for each flat tensor that DeepSpeed gives the base optimizer; those of all steps."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:  # which empties the groups between steps
        return [(optimizer.sub_group_to_group_id[i], f) for i, f in enumerate(optimizer.fp32_partitioned_groups_flat)]
    return [(i, flat) for i, group in enumerate(optimizer.optimizer.param_groups) for flat in group["params"]]


def gradients(engine: Any) -> list[Tensor]:
    """What this rank's optimizer holds of the reduced gradients when the base optimizer is first called in a step.

    That is the gradient of the flats it is called with, and what DeepSpeed has ready for its later calls.
    """
    base = engine.optimizer.optimizer
    ready = [flat.grad for group in base.param_groups for flat in group["params"]]
    later = [grad for grads in getattr(engine.optimizer, "averaged_gradients", {}).values() for grad in grads or ()]
    return [grad for grad in (*ready, *later) if grad is not None]


def reduced_gradient(engine: Any, shard: LocalShard) -> Tensor:
    """A shard's gradient after reduction over the replicas and before the update: a view of where DeepSpeed has it."""
    number = next(i for i, (_, flat) in enumerate(flats(engine)) if flat is shard.flat)
    if (parts := getattr(engine.optimizer, "fp32_groups_gradient_flat_partition", None)) is not None:
        return shard.of(parts[number])
    begin = 0
    for piece in engine.optimizer.averaged_gradients[number]:  # laid out like the flat, one piece per parameter
        if begin == shard.offset:
            return piece.detach().view(-1).narrow(0, 0, shard.numel)
        begin += piece.numel()
    raise AssertionError(f"{shard.place.name} has no gradient")


@torch.no_grad()
def refresh(engine: Any) -> None:
    """Make the model's weights what the masters say, on all ranks. Collective."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        optimizer.update_lp_params()
        return
    persistent = optimizer.persistent_parameters  # small ones, which ZeRO-3 keeps whole on every rank
    if persistent:
        persistent[0].partition(persistent)
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if persistent:
        persistent[0].all_gather(persistent)


def loss_scaler_state(engine: Any) -> LossScalerState | None:
    """The state of fp16's dynamic loss scaler; ``None`` without one."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is None or not scaler.dynamic:
        return None
    return LossScalerState(
        cur_scale=float(scaler.cur_scale),
        cur_iter=scaler.cur_iter,
        last_overflow_iter=scaler.last_overflow_iter,
        cur_hysteresis=scaler.cur_hysteresis,
    )


def set_loss_scaler_state(engine: Any, state: LossScalerState) -> None:
    """Restore what :func:`loss_scaler_state` returned."""
    for key, value in state:
        setattr(engine.optimizer.loss_scaler, key, value)


def reset_loss_scaler(engine: Any, precision: PrecisionConfig) -> None:
    """Make fp16's loss scale begin anew."""
    scale, hysteresis = 2.0**precision.initial_scale_power, precision.hysteresis
    anew = LossScalerState(cur_scale=scale, cur_iter=0, last_overflow_iter=-1, cur_hysteresis=hysteresis)
    set_loss_scaler_state(engine, anew)


def _zero12(engine: Any, weight: nn.Parameter) -> LocalShard:
    """A shard under ZeRO 1 and 2, which lay a group's parameters end to end and cut that over the DP ranks."""
    base, known = engine.optimizer.optimizer, place(weight)
    flat = base.param_groups[base.group_of[known.name]]["params"][0]
    mapping = weight._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return LocalShard(known, 0, 0, flat, 0)
    inner = mapping.lp_fragment_address
    return LocalShard(known, inner.start, inner.numel, flat, mapping.hp_fragment_address.start)


def _zero3(engine: Any, weight: Any) -> LocalShard:
    """The same under ZeRO-3, which cuts each parameter evenly over the DP ranks, the last parts padded."""
    optimizer = engine.optimizer
    group, offset, numel = optimizer.grad_position[optimizer.get_param_id(weight)]
    start = dist.get_rank(optimizer.dp_process_group) * weight.ds_tensor.ds_numel
    numel = max(0, min(int(numel), weight.ds_numel - start))
    return LocalShard(place(weight), start, numel, optimizer.fp32_partitioned_groups_flat[group], int(offset))
