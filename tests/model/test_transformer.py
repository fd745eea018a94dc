"""The model and its parts on one process against the reference, in float64: values and all gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_stable.config.recipes import RECIPES
from megatron_stable.config.schema import ModelConfig
from megatron_stable.model import sigma
from megatron_stable.model.mlp import ACTIVATIONS
from megatron_stable.model.norms import Norm
from megatron_stable.model.positions import EmbeddingOutput, rotary_table, rotate
from megatron_stable.model.transformer import Transformer, layer_list
from megatron_stable.parallel.parameters import place
from megatron_stable.parallel.topology import TensorParallel
from tests.reference import model as reference

VOCAB = 61
ALONE = TensorParallel()


def config(**fields: Any) -> ModelConfig:
    shape = {"size": None, "layers": 2, "hidden": 24, "heads": 4, "ffn_hidden": 40, "sequence_length": 11}
    return ModelConfig(**{**shape, "vocab_size": VOCAB, **fields})


def filled(module: nn.Module, parameters: reference.Parameters) -> nn.Module:
    """The module in float64 with the reference's parameters; rows of padding get values that must not matter."""
    module.double()

    def fill(weights: Iterable[nn.Parameter]) -> None:
        with torch.no_grad():
            for weight in weights:
                value = parameters[place(weight).name]
                weight.fill_(1e3)
                weight[: len(value)] = value

    fill(module.parameters())
    sigma.start(module, seed=0)  # the singular vectors of these weights; sets gamma, too
    fill(weight for name, weight in module.named_parameters() if name.endswith(".gamma"))
    return module


MODELS = {
    "defaults": {},
    "bias_learned_squared_relu": {"bias": True, "positions": "learned", "activation": "squared_relu", "kv_heads": 1},
    "swiglu_rmsnorm_gqa_tied": {"activation": "swiglu", "norm": "rmsnorm", "kv_heads": 2, "tied_embeddings": True},
    "geglu": {"activation": "geglu", "norm": "rmsnorm", "kv_heads": 2},
    "swiglu_bias_no_positions": {"activation": "swiglu", "bias": True, "positions": "none", "rope_theta": 100.0},
    "gelu_erf": {"activation": "gelu_erf"},
    "theta_and_eps": {"rope_theta": 50.0, "norm_eps": 0.1, "bias": True},
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("length", [11, 6])
def test_logits_and_gradients_equal_the_reference(recipe: str, fields: dict[str, Any], length: int) -> None:
    cfg = config(recipe=recipe, **fields)
    parameters = reference.draw_parameters(cfg, VOCAB, seed=5)
    model = filled(Transformer(layer_list(cfg, ALONE, seed=0, draw=False)), parameters)
    tokens = torch.randint(VOCAB, (3, length), generator=torch.Generator().manual_seed(1))
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    found, wanted = model(tokens)[..., :VOCAB], reference.forward(leaves, tokens, cfg)
    if cfg.final_logit_cap is not None:  # which is left to the loss
        found = cfg.final_logit_cap * torch.tanh(found / cfg.final_logit_cap)
    # the rotary table is fp32
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    direction = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (found * direction).sum().backward()
    (wanted * direction).sum().backward()
    gradients = {place(p).name: p.grad for p in model.parameters()}
    assert set(gradients) == set(leaves)
    for name, leaf in leaves.items():
        gradient = gradients[name]
        assert gradient is not None and leaf.grad is not None
        scale = float(leaf.grad.abs().max())
        torch.testing.assert_close(gradient[: len(leaf)], leaf.grad, rtol=1e-5, atol=1e-6 * scale + 1e-9, msg=name)
        assert (gradient[len(leaf) :] == 0).all() or cfg.tied_embeddings, f"{name}: padding has a gradient"


def test_later_tokens_change_nothing_before_them() -> None:
    cfg = config(recipe="qk_norm_cap")
    model = Transformer(layer_list(cfg, ALONE, seed=0))
    tokens = torch.randint(VOCAB, (1, 11), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % VOCAB
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7]) and not torch.equal(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("theta", [100.0, 10000.0])
@pytest.mark.parametrize("width", [2, 8, 64])
def test_rotation_equals_the_reference(theta: float, width: int) -> None:
    x = torch.randn(2, 13, 3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(x, theta), reference.rotate(x, theta), rtol=1e-6, atol=1e-6)
    assert torch.equal(rotate(x, theta)[:, 0], x[:, 0]), "position 0 does not turn"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rotation_far_into_the_sequence_is_rounded_only_once(dtype: torch.dtype) -> None:
    x = torch.randn(1, 8192, 1, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, wanted = rotate(x, 10000.0), reference.rotate(x.double(), 10000.0)
    assert found.dtype == dtype
    # of a pair's length, for the two products cancel
    length = x.double().unflatten(-1, (2, 32)).norm(dim=-2).repeat(1, 1, 1, 2)
    bound = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}[dtype]
    assert ((found.double() - wanted).abs() / length).max() < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rotation_has_the_bits_of_the_plain_equation(dtype: torch.dtype) -> None:
    qkv = torch.randn(2, 13, 3, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    direction = torch.randn(2, 13, 3, 8, generator=torch.Generator().manual_seed(1)).to(dtype)

    def plain(x: torch.Tensor) -> torch.Tensor:
        cos, sin = rotary_table(13, 8, 100.0, x.device).unsqueeze(2)
        first, second = x.chunk(2, -1)
        return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)

    def with_gradient(turn: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x = qkv[..., 0, :].detach().requires_grad_()  # strided, as within attention
        y = turn(x)
        return y, torch.autograd.grad(y, x, direction)[0]

    (found, gradient), (wanted, wanted_gradient) = with_gradient(lambda x: rotate(x, 100.0)), with_gradient(plain)
    assert torch.equal(found, wanted)
    if dtype == torch.float32:
        assert torch.equal(gradient, wanted_gradient)
    else:  # which that equation rounds twice, and adds in half precision
        x = torch.zeros(direction.shape, dtype=torch.float64, requires_grad=True)
        (exact,) = torch.autograd.grad(reference.rotate(x, 100.0), x, direction.double())
        assert (gradient - exact).abs().max() < (wanted_gradient - exact).abs().max()


def test_rotation_has_a_second_derivative() -> None:
    x = torch.randn(1, 3, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotate(x, 3.0), x, atol=1e-6)
    assert torch.autograd.gradgradcheck(lambda x: rotate(x, 3.0), x, atol=1e-6)


def test_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    turned_q, turned_k = (rotate(x.expand(1, 20, 1, 16), 100.0)[0, :, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    for distance in range(10):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "bias"), [("layernorm", False), ("layernorm", True), ("rmsnorm", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_equal_the_reference(kind: str, bias: bool, dtype: torch.dtype) -> None:
    cfg = config(norm=kind, bias=bias, norm_eps=0.05)
    norm = Norm(16, cfg, partial=True)
    assert (norm.bias is not None) == (bias and kind == "layernorm")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in norm.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    norm.to(dtype)
    x = (0.3 * torch.randn(4, 7, 16, generator=generator) + 5).to(dtype)  # a mean that cancels
    parameters = {f"n.{name}": value.detach().double() for name, value in norm.named_parameters()}
    wanted = reference.norm(parameters, "n", x.double(), cfg)
    bound = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(norm(x).double(), wanted, rtol=bound, atol=bound)


def test_activations_are_their_formulas() -> None:
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    tanh = torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    torch.testing.assert_close(ACTIVATIONS["gelu"](x), 0.5 * x * (1 + tanh))
    torch.testing.assert_close(ACTIVATIONS["gelu_erf"](x), x * 0.5 * torch.erfc(-x / 2**0.5))
    torch.testing.assert_close(ACTIVATIONS["squared_relu"](x), torch.where(x > 0, x * x, torch.zeros_like(x)))
    gate, up = x, x.flip(0) + 1
    by_tanh = gate / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
    torch.testing.assert_close(ACTIVATIONS["geglu"](torch.cat((gate, up))), by_tanh)
    torch.testing.assert_close(ACTIVATIONS["swiglu"](torch.cat((gate, up))), gate / (1 + (-gate).exp()) * up)


def test_embedding_output_adds_the_learned_positions() -> None:
    cfg = config(positions="learned")
    layer = EmbeddingOutput(cfg, ALONE)
    table = torch.randn(11, 24)
    with torch.no_grad():
        layer.weight.copy_(table)  # type: ignore[union-attr]
    x = torch.randn(2, 8, 24)
    torch.testing.assert_close(layer(x), x + table[:8])
    assert torch.equal(EmbeddingOutput(config(), ALONE)(x), x)


def test_block_is_its_equation() -> None:
    cfg = config(bias=True, recipe="qk_norm")
    parameters = reference.draw_parameters(cfg, VOCAB, seed=3)
    (layer,) = (layer for layer in layer_list(cfg, ALONE, seed=0) if layer.name == "blocks.1")
    block = filled(layer.build(), parameters)
    x = torch.randn(2, 11, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def norm(name: str, value: Tensor) -> Tensor:
        return reference.norm(parameters, f"blocks.1.{name}", value, cfg)

    middle = x + reference.attention(parameters, "blocks.1.attention", norm("attention_input_norm", x), cfg)
    wanted = middle + reference.mlp(parameters, "blocks.1.mlp", norm("mlp_input_norm", middle), cfg)
    torch.testing.assert_close(block(x), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("setting", "wanted"), [("none", []), ("full", [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3])])
def test_recomputation_covers_the_blocks_it_names(setting: str | int, wanted: list[int]) -> None:
    """Recomputed: a block's forward runs twice for a backward."""
    cfg = config(layers=5, activation_checkpointing=setting)
    model = Transformer(layer_list(cfg, ALONE, seed=0))
    calls: dict[int, int] = {}
    for i in range(5):
        block = model.layers[f"blocks_{i}"]
        block.mlp.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls.get(i, 0) + 1))
    model(torch.zeros(1, 11, dtype=torch.int64)).sum().backward()
    assert [i for i in range(5) if calls[i] == 2] == wanted and set(calls.values()) <= {1, 2}


def test_cost_counts_the_floating_point_operations() -> None:
    """Against torch's own counter of matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    for fields in (
        {},
        {"activation": "swiglu", "kv_heads": 2, "bias": True},
        {"positions": "learned", "tied_embeddings": True},
    ):
        cfg = config(attention="math", **fields)
        layers = layer_list(cfg, ALONE, seed=0)
        with FlopCounterMode(display=False) as counter:
            Transformer(layers)(torch.zeros(2, 11, dtype=torch.int64))
        assert sum(layer.cost for layer in layers) * 2 * 11 == pytest.approx(counter.get_total_flops(), rel=1e-9)
