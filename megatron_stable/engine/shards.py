"""Views into DeepSpeed's optimizer state: which part of which parameter this rank owns, under its global name.

DeepSpeed flattens parameters into per-rank partitions, differently in each of its optimizers. Here each rank's
part of each parameter becomes a :class:`Shard` whose tensors are views: read them to save, write them to load.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_stable.parallel.parameters import Place, place

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Shard:
    """A rank's part of a parameter: elements ``[start, start + numel)`` of its flattened TP slice.

    Attributes:
        place: Where the parameter sits in the whole model.
        start: First element, in the flattened local slice.
        flat: The partition of DeepSpeed's that holds it, a parameter of the base optimizer.
        offset: First element, in ``flat``.
        owned: Whether this rank is the one to write it (replicated and tied parameters have several holders).
        tensors: 1-d fp32 views: ``weight`` (the master), ``exp_avg``, ``exp_avg_sq``.
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
    flats = [flat for group in base.param_groups for flat in group["params"]]
    for flat in flats or engine.optimizer.fp32_partitioned_groups_flat:  # ZeRO-3 empties its groups between steps
        _ensure_state(base, flat)
    locate = _zero3 if engine.zero_optimization_stage() == 3 else _zero12
    shards = []
    for weight in module.parameters():
        known = place(weight)
        owned = (known.dim is not None or _tensor_rank(engine) == 0) and not getattr(
            weight, "ds_pipe_replicated", False
        )
        for flat, offset, start, numel in locate(engine, weight):
            tensors = {"weight": flat.detach().narrow(0, offset, numel)}
            tensors |= {key: base.state[flat][key].narrow(0, offset, numel) for key in MOMENTS}
            shards.append(Shard(known, start, flat, offset, owned, tensors))
    return shards


def optimizer_steps(engine: Any) -> int:
    """Updates that the base optimizer has applied, which differ from attempted steps by the dropped ones."""
    base = engine.optimizer.optimizer
    return max((int(state["step"]) for state in base.state.values() if "step" in state), default=0)


def set_optimizer_steps(engine: Any, steps: int) -> None:
    """Set Adam's step count, on which its bias correction depends."""
    for state in engine.optimizer.optimizer.state.values():
        state["step"].fill_(float(steps))


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


_SCALER = {"cur_scale": float, "cur_iter": int, "last_overflow_iter": int, "cur_hysteresis": int}


def _tensor_rank(engine: Any) -> int:
    rank: int = engine.mpu.get_tensor_model_parallel_rank()
    return rank


def _ensure_state(base: torch.optim.Optimizer, flat: Tensor) -> None:
    state = base.state[flat]
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        for key in MOMENTS:
            state[key] = torch.zeros_like(flat.detach())


def _zero12(engine: Any, weight: nn.Parameter) -> Iterator[tuple[Tensor, int, int, int]]:
    """(flat master, offset in it, start in the parameter, elements); at most one under ZeRO 1 and 2."""
    mapping = weight._hp_mapping  # type: ignore[attr-defined]
    if mapping is not None:
        flat = engine.optimizer.optimizer.param_groups[mapping.param_group_index]["params"][0]
        inner = mapping.lp_fragment_address
        yield flat, mapping.hp_fragment_address.start, inner.start, inner.numel


def _zero3(engine: Any, weight: Any) -> Iterator[tuple[Tensor, int, int, int]]:
    """The same under ZeRO-3, where each parameter is cut evenly over the data-parallel ranks, the last parts padded."""
    optimizer = engine.optimizer
    group, offset, numel = optimizer.grad_position[optimizer.get_param_id(weight)]
    start = dist.get_rank(optimizer.dp_process_group) * weight.ds_tensor.ds_numel
    numel = min(int(numel), weight.ds_numel - start)
    if numel > 0:
        yield optimizer.fp32_partitioned_groups_flat[group], int(offset), start, numel
