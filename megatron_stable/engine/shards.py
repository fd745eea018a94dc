"""Views into DeepSpeed's optimizer state: which part of which parameter this rank owns, under its global name.

DeepSpeed flattens parameters into per-rank partitions, differently in each of its optimizers. Here each rank's
part of each parameter becomes a :class:`Shard` whose tensors are views: read them to save, write them to load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_stable.config.schema import PrecisionConfig
from megatron_stable.model import sigma
from megatron_stable.optim.segments import Segment
from megatron_stable.parallel.parameters import Place, place


@dataclass(frozen=True)
class Shard:
    """A rank's part of a parameter: elements ``[start, start + numel)`` of its flattened TP slice.

    Attributes:
        place: Where the parameter sits in the whole model.
        start: First element, in the flattened local slice.
        flat: The partition of DeepSpeed's that holds it, a parameter of the base optimizer.
        offset: First element, in ``flat``.
        owned: Whether this rank is the one to write it (replicated and tied parameters have several holders).
        tensors: 1-d fp32 views: ``weight`` (the master), and the moments that its rule keeps, by name.
    """

    place: Place
    start: int
    flat: Tensor
    offset: int
    owned: bool
    tensors: dict[str, Tensor]

    @property
    def numel(self) -> int:
        """Elements."""
        return self.tensors["weight"].numel()


def local_shards(engine: Any, module: nn.Module) -> list[Shard]:
    """The shards of this rank; ``engine`` is DeepSpeed's. Optimizer state that does not exist yet is made, as zeros."""
    base = engine.optimizer.optimizer
    shards = []
    for weight, segment in zip(module.parameters(), segments(engine, module), strict=True):
        known = segment.place
        owned = (known.dim is not None or _tensor_rank(engine) == 0) and not getattr(
            weight, "ds_pipe_replicated", False
        )
        if segment.numel:
            whole = {"weight": segment.flat, **base.moments(segment.flat)}
            tensors = {key: segment.of(tensor) for key, tensor in whole.items()}
            shards.append(Shard(known, segment.start, segment.flat, segment.offset, owned, tensors))
    return shards


def vector_shards(engine: Any, module: nn.Module) -> list[Shard]:
    """The state of sigmaReparam on this rank, vectors that are no parameters, as shards to save and load."""
    found = []
    for known, vector in sigma.vectors(module):
        owned = engine.mpu.get_data_parallel_rank() == 0 and (known.dim is not None or _tensor_rank(engine) == 0)
        flat = vector.view(-1)
        found.append(Shard(known, 0, flat, 0, owned, {"weight": flat}))
    return found


def segments(engine: Any, module: nn.Module) -> list[Segment]:
    """This rank's segment of each parameter of ``module``, in its order; some are empty. ``engine`` is DeepSpeed's."""
    locate = _zero3 if engine.zero_optimization_stage() == 3 else _zero12
    return [locate(engine, weight) for weight in module.parameters()]


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


def optimizer_steps(engine: Any) -> int:
    """Updates that the base optimizer has applied, which differ from attempted steps by the dropped ones."""
    updates: int = engine.optimizer.optimizer.updates
    return updates


def set_optimizer_steps(engine: Any, steps: int) -> None:
    """Set the count of applied updates, on which Adam's bias correction depends."""
    engine.optimizer.optimizer.set_updates(steps)


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


def loss_scaler_state(engine: Any) -> dict[str, float] | None:
    """The complete state of fp16's dynamic loss scaler as plain numbers; ``None`` without one."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is None or not scaler.dynamic:
        return None
    return {key: float(getattr(scaler, key)) for key in _SCALER}


def set_loss_scaler_state(engine: Any, state: dict[str, float]) -> None:
    """Restore what :func:`loss_scaler_state` returned."""
    for key, kind in _SCALER.items():
        setattr(engine.optimizer.loss_scaler, key, kind(state[key]))


def reset_loss_scaler(engine: Any, precision: PrecisionConfig) -> None:
    """Make fp16's loss scale begin anew."""
    begin = {"cur_scale": 2.0**precision.initial_scale_power, "cur_iter": 0, "last_overflow_iter": -1}
    set_loss_scaler_state(engine, {**begin, "cur_hysteresis": precision.hysteresis})


_SCALER = {"cur_scale": float, "cur_iter": int, "last_overflow_iter": int, "cur_hysteresis": int}


def _tensor_rank(engine: Any) -> int:
    rank: int = engine.mpu.get_tensor_model_parallel_rank()
    return rank


def _zero12(engine: Any, weight: nn.Parameter) -> Segment:
    """This rank's part under ZeRO 1 and 2, which lay a group's parameters end to end and cut that over the DP ranks."""
    base, known = engine.optimizer.optimizer, place(weight)
    flat = base.param_groups[base.group_of[known.name]]["params"][0]
    mapping = weight._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return Segment(known, flat, 0, 0, 0)
    inner = mapping.lp_fragment_address
    return Segment(known, flat, mapping.hp_fragment_address.start, inner.start, inner.numel)


def _zero3(engine: Any, weight: Any) -> Segment:
    """The same under ZeRO-3, which cuts each parameter evenly over the DP ranks, the last parts padded."""
    optimizer = engine.optimizer
    group, offset, numel = optimizer.grad_position[optimizer.get_param_id(weight)]
    start = dist.get_rank(optimizer.dp_process_group) * weight.ds_tensor.ds_numel
    numel = max(0, min(int(numel), weight.ds_numel - start))
    return Segment(place(weight), optimizer.fp32_partitioned_groups_flat[group], int(offset), start, numel)
