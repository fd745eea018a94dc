"""Which parameters decay under the defaults, and AdamW's update itself."""

from __future__ import annotations

from typing import Any

import torch

from megatron_stable.config.schema import Config
from megatron_stable.model.transformer import Transformer, layer_list
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
