"""Where a step first goes wrong: replay it without its update, and look at every module and every gradient."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from math import isfinite, sqrt
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from megatron_stable.parallel.parameters import is_partial, place
from megatron_stable.parallel.topology import Topology

Found = list[tuple[str, Tensor]]  # by name, in order of computation


class Diagnosis(NamedTuple):
    """What a replayed step showed.

    Attributes:
        module: The first whose output is not finite, in the order of forward; if none, the first parameter whose
            gradient is not finite, in the order of backward; ``None``: all was finite this time.
        norms: By layer ("embedding", "blocks.0" ...) the gradient norm of its worst micro batch, unscaled; ``None``
            where it is not finite.
    """

    module: str | None
    norms: dict[str, float | None]


def diagnose(module: nn.Module, topology: Topology, replay: Callable[[], object], loss_scale: float = 1.0) -> Diagnosis:
    """Replay a step and look. Collective.

    Args:
        module: The layers of this rank.
        replay: Runs forward and backward of the step.
        loss_scale: What the gradients are multiplied with.
    """
    outputs: Found = []
    gradients: Found = []
    handles = [
        *(m.register_forward_hook(_look(name, outputs)) for m in module.modules() if (name := _name(m))),
        *(w.register_hook(_measure(w, gradients, topology)) for w in module.parameters()),
    ]
    try:
        replay()
    finally:
        for handle in handles:
            handle.remove()
    squares: dict[str, float] = defaultdict(float)
    for name, square in gradients:
        value = float(square)
        squares[name] = max(squares[name], value if isfinite(value) else float("inf"))
    mine = {
        "stage": topology.stage,
        "tensor": topology.tensor_rank,
        "forward": next((name for name, bad in outputs if bool(bad)), None),
        "backward": next((name for name, square in gradients if not isfinite(float(square))), None),
        "squares": {place(w).name: (squares.get(place(w).name, 0.0), place(w).dim is not None) for w in _own(module)},
    }
    ranks: list[dict[str, Any]] = [{}] * topology.world
    dist.all_gather_object(ranks, mine)
    forward = [rank["forward"] for rank in sorted(ranks, key=lambda rank: rank["stage"]) if rank["forward"]]
    backward = [rank["backward"] for rank in sorted(ranks, key=lambda rank: -rank["stage"]) if rank["backward"]]
    return Diagnosis(next(iter([*forward, *backward]), None), _norms(ranks, loss_scale))


def _norms(ranks: list[dict[str, Any]], scale: float) -> dict[str, float | None]:
    parts: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))  # by parameter and TP rank
    for rank in ranks:
        for name, (square, sharded) in rank["squares"].items():
            part = rank["tensor"] if sharded else 0
            parts[name][part] = max(parts[name][part], square)
    layers: dict[str, float] = defaultdict(float)
    for name, by_rank in parts.items():
        words = name.split(".")
        layers[".".join(words[:2]) if words[0] == "blocks" else words[0]] += sum(by_rank.values())
    order = sorted(layers, key=lambda name: (name != "embedding", not name.startswith("blocks."), _number(name)))
    return {name: sqrt(layers[name]) / scale if isfinite(layers[name]) else None for name in order}


def _number(layer: str) -> int:
    return int(layer.split(".")[1]) if layer.startswith("blocks.") else 0


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in module.parameters() if not getattr(weight, "ds_pipe_replicated", False)]


def _name(module: nn.Module) -> str | None:
    """What a module that has parameters of its own is called in the whole model."""
    weight = next(module.parameters(recurse=False), None)
    return None if weight is None else place(weight).name.rpartition(".")[0]


def _look(name: str, found: Found) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            found.append((name, ~output.detach().isfinite().all()))

    return hook


def _measure(weight: nn.Parameter, found: Found, topology: Topology) -> Callable[[Tensor], None]:
    def hook(grad: Tensor) -> None:
        whole = grad.detach().float()
        if is_partial(weight):
            dist.all_reduce(whole := whole.clone(), group=topology.tensor_group)
        found.append((place(weight).name, whole.square().sum()))

    return hook
