"""sigmaReparam in half precision: gamma as the optimizer has it, and no second weight."""

from __future__ import annotations

from typing import Any

import torch

from megatron_stable.config.schema import Config
from tests.engine.layouts import global_batches, make_config, micro_batches
from tests.harness.ranks import Ranks


def gammas(values: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """On a rank: train in steps too small for bf16; of each gamma what the layer takes and what this rank holds."""
    from megatron_stable.engine.engine import Engine
    from megatron_stable.model import sigma
    from megatron_stable.parallel.parameters import place
    from megatron_stable.parallel.topology import Topology

    config, topology = Config.model_validate(values), Topology()
    engine = Engine(config, topology)
    for step, tokens in enumerate(global_batches(2), start=1):
        engine.train_step(step, micro_batches(tokens, config, topology), 1e-4)
    engine.evaluate([])
    held = {s.shard.place.name: float(s.tensors["weight"]) for s in engine.shards() if s.shard.place.full_shape == (1,)}
    layers = [part for part in engine.module.modules() if isinstance(part, sigma.SigmaReparam)]
    taken = {place(layer.gamma).name: float(layer.master) for layer in layers if layer.master is not None}
    return {name: (taken[name], value) for name, value in held.items()}


def test_gamma_is_fp32_where_the_model_is_bf16(ranks: Ranks) -> None:
    config = make_config({"recipe": "sigma_reparam"}, precision={"dtype": "bf16"})
    found = [gamma for result in ranks.run(2, gammas, config.model_dump(mode="json")) for gamma in result.items()]
    assert len(found) == 4 * 4, "each is held by one of the replicas"
    for name, (taken, held) in found:
        assert taken == held, name
    rounded = [float(torch.tensor(held).bfloat16()) for _, (_, held) in found]
    assert all(value != held for value, (_, (_, held)) in zip(rounded, found, strict=True))


def test_a_micro_batch_makes_no_second_weight() -> None:
    """Forward makes nothing of a matrix's size; backward its gradient, and what sigma adds to that."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_stable.model import sigma
    from megatron_stable.parallel.layers import RowParallelLinear
    from megatron_stable.parallel.parameters import name_parameters
    from megatron_stable.parallel.shards import Init
    from megatron_stable.parallel.topology import TensorParallel

    linear = RowParallelLinear(256, 192, Init(std=0.1), TensorParallel())
    linear = sigma.reparametrized(linear, make_config({"recipe": "sigma_reparam"}).model)
    name_parameters(linear, "linear")
    torch.nn.init.normal_(linear.weight)
    sigma.start(torch.nn.ModuleList([linear]), 0)
    made = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.numel() == 192 * 256 and not function.is_view:
                made.append(str(function))
            return found

    with Counting():
        y = linear(torch.randn(1, 8, 256))
    assert not made
    y.sum().backward()
    assert linear.weight.grad is not None
