"""Stand up one rank of many, let it take a step, and count what it holds and what it sends."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_stable.config.schema import Config

SMALL = 1024  # bytes: what is below is no matter of scale (norms, losses, flags)
# which argument of a collective holds what this rank puts in
INPUT = {
    "allreduce_": 0,
    "reduce_": 0,
    "_reduce_scatter_base_": 1,
    "_allgather_base_": 1,
    "broadcast_": 0,
    "send": 0,
    "alltoall_base_": 1,
    "barrier": 0,
}


def count_on_rank(values: dict[str, Any], steps: int = 2, alone: bool = True) -> dict[str, Any]:
    """On a rank, real or imagining the others (``alone``): the engine takes steps on random tokens.

    Returns:
        ``parameters`` of this rank; ``held``: bytes by kind when all gradients are there and before the update;
        ``sent``: bytes by collective and by the size of its group, of the last step, without small ones; ``calls``: how
        many, with them; ``groups``: members by name.
    """
    from megatron_stable.engine.engine import Engine
    from megatron_stable.engine.outcome import Refused
    from megatron_stable.parallel.topology import Topology

    config = Config.model_validate(values)
    topology = Topology(config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence)
    engine = Engine(config, topology)
    if alone:
        imagine_stages()
    batch, length = config.batch.micro_size, config.model.sequence_length
    held: dict[str, int] = {}

    def approve(metrics: Any) -> Refused:
        held.update(_held(engine))
        return Refused(True)

    for step in range(1, steps + 1):
        batches = [
            torch.randint(0, config.model.vocab_size or 2, (batch, length + 1)) for _ in range(engine.accumulation)
        ]
        with Sent() as sent:
            engine.train_step(step, batches, 1e-3, approve)
    groups = {name: dist.get_process_group_ranks(group) for name, group in vars(topology).items() if "group" in name}
    parameters = sum(getattr(weight, "ds_numel", weight.numel()) for weight in engine.module.parameters())
    return {
        "parameters": parameters,
        "held": held,
        "sent": dict(sent.bytes),
        "calls": dict(sent.calls),
        "groups": groups,
    }


def imagine_stages() -> None:
    """Nothing arrives from stages that are not there: let it be zeros."""
    dist.recv = lambda tensor, *_, **__: tensor.zero_()


def _held(engine: Any) -> dict[str, int]:
    """Bytes of all tensors that live, by what they are; each storage once."""
    base = engine.deepspeed.optimizer.optimizer
    flats = [flat for group in base.param_groups for flat in group["params"]]
    kinds: dict[int, str] = {}
    for kind, tensors in (
        ("moments", [t for state in base.state.values() for t in state.values()]),
        ("masters", flats),
        ("weights", list(engine.module.parameters())),
    ):
        kinds |= {tensor.untyped_storage().data_ptr(): kind for tensor in tensors}
    sizes = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    found: Counter[str] = Counter()
    for pointer, size in sizes.items():
        if size > SMALL:
            found[kinds.get(pointer, "gradients")] += size
    return dict(found)


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank puts into collectives, by name and by the size of the group."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, int]] = Counter()
        self.calls: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and (name := func._schema.name.removeprefix("c10d::")) in INPUT:
            given = args[INPUT[name]]
            size = sum(t.numel() * t.element_size() for t in (given if isinstance(given, list) else [given]))
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            self.calls[name, group.size()] += 1
            if size > SMALL:
                self.bytes[name, group.size()] += size
        return func(*args, **(kwargs or {}))
