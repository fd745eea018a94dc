"""Each update rule against its formula, and against PyTorch's implementation where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from megatron_stable.config.schema import Config
from megatron_stable.optim.muon import matrices, newton_schulz, orthogonalize_
from megatron_stable.optim.optimizer import Optimizer
from megatron_stable.parallel.parameters import name_parameters, parameter
from megatron_stable.parallel.shards import Init
from tests.optim.formulas import Rules

MODEL = {
    "size": None, "layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "sequence_length": 8, "vocab_size": 20,
}  # fmt: skip
SHAPES = {
    "embedding.weight": (20, 32),
    "blocks.0.attention.qkv.weight": (64, 32),
    "blocks.0.attention.qkv.bias": (64,),
    "blocks.0.mlp.fc1.weight": (2, 48, 32),
    "blocks.0.mlp.fc2.weight": (32, 48),
    "blocks.0.norm.weight": (32,),
    "final_norm.weight": (32,),
    "head.weight": (20, 32),
}
CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw_tiny_eps": {"eps": 1e-15},
    "independent": {"independent_weight_decay": True, "weight_decay": 0.01, "parametrization": "mu_simple"},
    "no_decay": {"no_decay": ["embeddings", "head"]},
    "decay_all": {"no_decay": []},
    "stable_adamw": {"name": "stable_adamw", "betas": [0.9, 0.99]},
    "stable_adamw_independent": {"name": "stable_adamw", "independent_weight_decay": True},
    "muon": {"name": "muon"},
    "muon_independent": {"name": "muon", "independent_weight_decay": True, "muon_momentum": 0.8},
    "spam": {"spike_threshold": 0.9, "momentum_reset_every": 25, "momentum_reset_warmup": 3},
    "complete_p": {"parametrization": "complete_p", "base_width": 8, "base_depth": 1},
    "mu_full": {"parametrization": "mu_full", "base_width": 8},
    "zclip": {"clipping": "zclip", "clipping_warmup": 3, "clipping_threshold": 0.5},
    "adagc": {"clipping": "adagc", "clipping_warmup": 3},
    "adagc_unlimited": {"clipping": "adagc", "clipping_warmup": 2, "clip_grad": 0.0},
    "centred": {"mu_centering": True},
}


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    """Parameters under the names of a model, drawn."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        prefix, _, last = name.rpartition(".")
        holder = nn.Module()
        holder.register_parameter(last, parameter(shape, Init()))
        name_parameters(holder, prefix)
        weight = found[name] = getattr(holder, last)
        weight.data.normal_(generator=generator)
    return found


def config_of(optimizer: dict[str, Any], **sections: Any) -> Config:
    return Config.model_validate({"model": MODEL, "optimizer": optimizer, **sections})


@pytest.mark.parametrize("case", CASES)
def test_updates_equal_the_formula(case: str) -> None:
    config, weights = config_of({"learning_rate": 0.01, **CASES[case]}), parameters()
    values = {name: weight.detach().double() for name, weight in weights.items()}
    optimizer, formula = Optimizer(weights.values(), config), Rules(config)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 31 if case == "spam" else 9):
        rate = 0.01 / step**0.5
        # of every size, now and then far larger than before, and once zero
        size = {4: 100.0, 6: 0.0, 23: 10.0}.get(step, 1.0)
        gradients = {
            n: size * (i + 0.5) * torch.randn(w.shape, generator=generator) for i, (n, w) in enumerate(weights.items())
        }
        for name, weight in weights.items():
            weight.grad = gradients[name].clone()
        optimizer.begin_step(rate)
        optimizer.step()
        values = formula.step(values, {name: g.double() for name, g in gradients.items()}, rate)
        for name, weight in weights.items():
            # fp32, and where a spike is just a spike or just not one
            got = weight.detach().double()
            assert torch.allclose(got, values[name], rtol=2e-4, atol=2e-5), f"{name} at step {step}"
            values[name] = got  # errors do not add up
    assert optimizer.updates == step


def run(config: Config, gradient: Any, steps: int = 3) -> dict[str, Tensor]:
    weights = parameters()
    optimizer = Optimizer(weights.values(), config)
    for step in range(1, steps + 1):
        for name, weight in weights.items():
            weight.grad = gradient(name, weight, step)
        optimizer.begin_step(config.optimizer.learning_rate * step / steps)
        optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}


def noise(name: str, weight: Tensor, step: int) -> Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))


def test_small_eps_lets_small_gradients_through() -> None:
    """Gradients of 1e-10 are lost in an eps of 1e-8, and move weights by the learning rate with one of 1e-15."""
    start = parameters()["head.weight"].detach()
    moved = {}
    for eps in (1e-8, 1e-15):
        config = config_of({"eps": eps, "weight_decay": 0.0, "learning_rate": 0.01, "betas": [0.9, 0.95]})
        end = run(config, lambda n, w, s: torch.full_like(w, 1e-10), steps=1)["head.weight"]
        moved[eps] = (end - start).abs()
    assert moved[1e-8].max() < 0.011 * 0.01
    torch.testing.assert_close(moved[1e-15], torch.full_like(start, 0.01), rtol=1e-3, atol=0)


@settings(deadline=None, max_examples=20)
@given(
    rate=st.floats(1e-6, 1.0), name=st.sampled_from(["adamw", "muon", "stable_adamw"]), width=st.sampled_from([8, 256])
)
def test_independent_decay_does_not_depend_on_the_learning_rate(rate: float, name: str, width: int) -> None:
    """With zero gradients nothing but decay is left: after a schedule, the same at every peak and every width."""
    scaling = {} if name == "muon" else {"parametrization": "mu_simple", "base_width": width}
    config = config_of(
        {"learning_rate": rate, "independent_weight_decay": True, "weight_decay": 0.3, "name": name, **scaling}
    )
    end = run(config, lambda n, w, s: torch.zeros_like(w))
    shrink = (1 - 0.3 / 3) * (1 - 0.6 / 3) * (1 - 0.3)
    for key, start in parameters().items():
        kept = 1.0 if key.endswith(("norm.weight", "bias")) else shrink
        torch.testing.assert_close(end[key], start.detach() * kept, rtol=1e-4, atol=1e-6)


def test_stable_adamw_is_adamw_while_gradients_are_usual_and_bounded_when_they_jump() -> None:
    usual, jump = (lambda n, w, s: torch.ones_like(w)), (lambda n, w, s: torch.full_like(w, 1.0 if s < 3 else 1e4))
    settings_ = {"learning_rate": 0.01, "weight_decay": 0.0, "betas": [0.9, 0.999]}
    plain, stable = config_of({**settings_, "name": "adamw"}), config_of({**settings_, "name": "stable_adamw"})
    for name, value in run(plain, usual).items():
        torch.testing.assert_close(run(stable, usual)[name], value, rtol=1e-5, atol=1e-6)
    before = run(stable, jump, steps=2)["head.weight"]
    assert float((run(stable, jump, steps=3)["head.weight"] - before).abs().max()) < 0.0101


def test_muon_equals_that_of_pytorch() -> None:
    """On a matrix that is one linear map; torch computes Newton-Schulz in bf16, so do we here."""
    settings_ = {"name": "muon", "learning_rate": 0.02, "weight_decay": 0.1, "clip_grad": 0.0}
    config = config_of(settings_, precision={"dtype": "bf16"})
    name = "blocks.0.mlp.fc2.weight"
    theirs = nn.Parameter(parameters()[name].detach().clone())
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(1, 4):
        reference.param_groups[0]["lr"] = 0.02 * step / 3
        theirs.grad = noise(name, theirs, step)
        reference.step()
    torch.testing.assert_close(run(config, noise)[name], theirs.detach(), rtol=1e-5, atol=1e-6)


def test_newton_schulz_brings_singular_values_near_one() -> None:
    for shape in ((1, 24, 24), (3, 16, 40)):
        values = torch.linalg.svdvals(newton_schulz(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert float(values.min()) > 0.6 and float(values.max()) < 1.3


def test_muon_sees_queries_keys_and_values_of_all_heads_as_three_maps() -> None:
    model = config_of({}).model
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    parts = list(matrices("blocks.0.attention.qkv.weight", weight, model))
    assert [part.reshape(-1, 32).shape[0] for part in parts] == [32, 16, 16]
    assert torch.equal(parts[1].reshape(-1, 32)[8:], weight[48:56])  # keys of group 1: after q q k v of 8 rows, q q
    orthogonalize_({"blocks.0.attention.qkv.weight": weight}, model, torch.float32)
    rms = [float(part.square().mean().sqrt()) for part in matrices("blocks.0.attention.qkv.weight", weight, model)]
    assert all(0.15 < value < 0.25 for value in rms), "the RMS of an update is that of Adam, about 0.2"


def test_a_step_that_is_not_approved_is_dropped_before_anything_changes() -> None:
    config, weights = config_of({"clipping": "zclip", "momentum_reset_every": 200}), parameters()
    optimizer = Optimizer(weights.values(), config)
    norms: list[float] = []

    def approve(norm: float) -> bool:
        norms.append(norm)
        return norm < 1000

    for step, size in enumerate((1.0, 1e6, 1.0), start=1):
        before = {n: w.detach().clone() for n, w in weights.items()}
        state = {n: {k: v.clone() for k, v in optimizer.state[w].items()} for n, w in weights.items()}
        statistics = str(optimizer.clipping_state())
        for name, weight in weights.items():
            weight.grad = size * noise(name, weight, step)
        optimizer.begin_step(0.01, approve)
        optimizer.step()
        same = all(torch.equal(before[n], w) for n, w in weights.items())
        assert same == (size > 1)
        if size > 1:
            assert all(torch.equal(state[n][k], v) for n, w in weights.items() for k, v in optimizer.state[w].items())
            assert statistics == str(optimizer.clipping_state())
    assert len(norms) == 3 and optimizer.updates == 2
    expected = sum(float(noise(n, w, 1).square().sum()) for n, w in weights.items()) ** 0.5
    assert norms[0] == pytest.approx(expected, rel=1e-6)
