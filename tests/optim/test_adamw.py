"""Which parameters decay under the defaults, and AdamW's update itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_stable.config.schema import Config
from megatron_stable.model.transformer import Transformer, layer_list
from megatron_stable.optim import adamw
from megatron_stable.optim.groups import parameter_groups
from megatron_stable.optim.optimizer import Optimizer
from megatron_stable.parallel.parameters import name_parameters, parameter, place
from megatron_stable.parallel.shards import Init
from megatron_stable.parallel.topology import TensorParallel
from tests.reference.optimizer import AdamW

SHAPE: dict[str, Any] = {
    "size": None, "layers": 1, "hidden": 32, "heads": 4, "sequence_length": 16, "vocab_size": 61,
}  # fmt: skip


def config(optimizer: dict[str, Any], **model: Any) -> Config:
    return Config.model_validate({"model": {**SHAPE, **model}, "optimizer": optimizer})


def test_matrices_decay_and_norms_and_biases_do_not() -> None:
    cfg = config({"weight_decay": 0.3}, bias=True, recipe="qk_norm", activation="swiglu", positions="learned")
    model = Transformer(layer_list(cfg.model, TensorParallel(), seed=0))
    groups = parameter_groups(model.parameters(), cfg)
    found = {place(p).name: group["weight_decay"] for group in groups for p in group["params"]}
    decaying = {"embedding.weight", "positions.weight", "head.weight"} | {
        f"blocks.0.{name}.weight" for name in ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
    }
    assert {name for name, decay in found.items() if decay == 0.3} == decaying
    # the bias of swiglu's FC1 has two dimensions, and is none the less a bias
    assert all(decay == 0.0 for name, decay in found.items() if name not in decaying)
    assert len(found) == len(list(model.parameters())) == 7 + 4 + 5 * 2  # matrices, their biases, norms
    assert all(group["params"] for group in groups), "DeepSpeed cannot flatten an empty group"


def test_update_equals_the_formula() -> None:
    cfg = config({"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.2, "clip_grad": 0.0})
    module = torch.nn.Module()
    module.matrix, module.vector = parameter((4, 3), Init(std=1.0)), parameter((5,), Init(std=1.0))
    name_parameters(module, "m")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    values = {name: p.detach().double() for name, p in module.named_parameters()}
    optimizer, reference = Optimizer(module.parameters(), cfg), AdamW(values, cfg.optimizer)
    for step in range(1, 6):
        rate = 0.1 / step
        gradients = {name: torch.randn(value.shape, generator=generator) for name, value in values.items()}
        for name, p in module.named_parameters():
            p.grad = gradients[name].clone()
        optimizer.begin_step(rate)
        optimizer.step()
        values = reference.step(values, {name: value.double() for name, value in gradients.items()}, rate)
        for name, p in module.named_parameters():
            torch.testing.assert_close(p.detach().double(), values[name], rtol=1e-5, atol=1e-6)


class Passes(TorchDispatchMode):
    """Counts the operators that take a tensor of some size."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.names = numel, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs or {}))
        if not func.is_view and any(isinstance(t, Tensor) and t.numel() == self.numel for t in given):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_clipping_is_no_pass_of_its_own() -> None:
    """The gradient is read for its norm and by the update, and what is left of it is the clipped one."""
    for clipping in ("global_norm", "zclip"):
        cfg = config({"clip_grad": 0.5, "clipping": clipping})
        module = torch.nn.Module()
        module.matrix = parameter((64, 32), Init(std=1.0))
        name_parameters(module, "m")
        torch.nn.init.normal_(module.matrix)
        optimizer = Optimizer(module.parameters(), cfg)
        for _ in range(2):  # the first makes the moments
            gradient = torch.randn(64, 32)
            module.matrix.grad = gradient.clone()
            optimizer.begin_step(0.1)
            with Passes(64 * 32) as counted:
                optimizer.step()
        assert counted.names == ["aten::linalg_vector_norm", "aten::_fused_adamw_"]
        assert float(module.matrix.grad.norm()) == pytest.approx(0.5, rel=1e-5)
        torch.testing.assert_close(module.matrix.grad, gradient * (0.5 / gradient.norm()))


@pytest.mark.parametrize("numel", [5, 64, 1003])  # vectors and what is left of them
def test_dividing_in_passing_is_dividing_before(numel: int) -> None:
    generator = torch.Generator().manual_seed(numel)
    group = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    results = []
    weight, gradients = torch.randn(numel, generator=generator), torch.randn(3, numel, generator=generator)
    for before in (True, False):
        state = {name: torch.zeros(numel) for name in adamw.MOMENTS} | {"step": torch.zeros(())}
        flat = adamw.Flat(weight.clone(), torch.empty(numel), state, group)
        for step, divisor in enumerate((1.0, 3.3, 1e6), start=1):
            flat.grad.copy_(gradients[step - 1] / divisor if before else gradients[step - 1])
            adamw.adamw([flat], step, None if before else torch.tensor(divisor))
        results.append((flat.weight, flat.grad, *state.values()))
    assert all(map(torch.equal, *results))
