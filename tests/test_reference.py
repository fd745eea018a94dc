"""The reference against facts that it was not written from: torch's own operators, closed forms, symmetries."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_stable.config.schema import Config, ModelConfig
from tests.reference import model, optimizer

VOCAB = 37


def config(**fields: Any) -> ModelConfig:
    return ModelConfig(
        **{
            "layers": 2,
            "hidden": 24,
            "heads": 4,
            "ffn_hidden": 40,
            "sequence_length": 11,
            "vocab_size": VOCAB,
            **fields,
        }
    )


def sample(cfg: ModelConfig, seed: int = 0, batch: int = 3) -> tuple[model.Parameters, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (batch, cfg.sequence_length + 1), generator=generator)
    return model.draw_parameters(cfg, VOCAB, seed), tokens[:, :-1], tokens[:, 1:]


def logits_by_torch(params: model.Parameters, tokens: Tensor, cfg: ModelConfig) -> Tensor:
    """The same model composed of torch's operators, per head, with RoPE as a complex product. No attention cap."""
    d, g, r = cfg.head_dim, cfg.groups, cfg.heads // cfg.groups
    s = tokens.shape[1]

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
        if cfg.norm == "rmsnorm":
            return F.rms_norm(x, weight.shape, weight, cfg.norm_eps)
        return F.layer_norm(x, weight.shape, weight, bias, cfg.norm_eps)

    def turn(x: Tensor) -> Tensor:  # [b, s, d]
        exponents = torch.arange(0, d, 2, dtype=torch.float64) / d
        angles = torch.outer(torch.arange(s, dtype=torch.float64), 1 / cfg.rope_theta**exponents)
        pairs = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag], -1)

    x = F.embedding(tokens, params["embedding.weight"])
    if cfg.positions == "learned":
        x = x + params["positions.weight"][:s]
    for i in range(cfg.layers):
        name = f"blocks.{i}.attention"
        weight, bias = params[f"{name}.qkv.weight"], params.get(f"{name}.qkv.bias")
        y = norm(f"{name}_input_norm", x)
        heads = []
        for head in range(cfg.heads):
            group = head // r
            first = group * (r + 2)  # row block of the group's first query

            def part(index: int) -> Tensor:
                rows = slice(index * d, (index + 1) * d)
                return F.linear(y, weight[rows], None if bias is None else bias[rows])  # noqa: B023

            q, k, v = part(first + head % r), part(first + r), part(first + r + 1)
            if cfg.qk_norm:
                q, k = norm(f"{name}.q_norm", q), norm(f"{name}.k_norm", k)
            if cfg.positions == "rope":
                q, k = turn(q), turn(k)
            heads.append(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        assert g * r == len(heads)
        x = x + F.linear(torch.cat(heads, -1), params[f"{name}.proj.weight"], params.get(f"{name}.proj.bias"))
        name = f"blocks.{i}.mlp"
        y = norm(f"{name}_input_norm", x)
        weight, bias = params[f"{name}.fc1.weight"], params.get(f"{name}.fc1.bias")
        if cfg.activation in ("swiglu", "geglu"):
            gate = F.linear(y, weight[0], None if bias is None else bias[0])
            gate = F.silu(gate) if cfg.activation == "swiglu" else F.gelu(gate, approximate="tanh")
            y = gate * F.linear(y, weight[1], None if bias is None else bias[1])
        elif cfg.activation == "gelu":
            y = F.gelu(F.linear(y, weight, bias), approximate="tanh")
        elif cfg.activation == "gelu_erf":
            y = F.gelu(F.linear(y, weight, bias))
        else:
            y = F.relu(F.linear(y, weight, bias)).square()
        x = x + F.linear(y, params[f"{name}.fc2.weight"], params.get(f"{name}.fc2.bias"))
    x = norm("final_norm", x)
    return F.linear(x, params["embedding.weight"] if cfg.tied_embeddings else params["head.weight"])


@pytest.mark.parametrize(
    ("norm", "positions", "activation", "bias", "kv_heads", "qk_norm", "tied"),
    [
        (norm, positions, activation, bias, kv_heads, qk_norm, tied)
        for (norm, bias), (positions, kv_heads), (activation, qk_norm, tied) in itertools.product(
            [("layernorm", False), ("layernorm", True), ("rmsnorm", True)],
            [("rope", None), ("learned", 2), ("none", 1), ("rope", 2)],
            [
                ("gelu", False, True),
                ("gelu_erf", True, True),
                ("squared_relu", True, False),
                ("swiglu", True, True),
                ("geglu", False, False),
            ],
        )
    ],
)
def test_logits_equal_those_composed_of_torch_operators(
    norm: str, positions: str, activation: str, bias: bool, kv_heads: int | None, qk_norm: bool, tied: bool
) -> None:
    cfg = config(
        norm=norm,
        positions=positions,
        activation=activation,
        bias=bias,
        kv_heads=kv_heads,
        qk_norm=qk_norm,
        tied_embeddings=tied,
    )
    params, tokens, _ = sample(cfg)
    torch.testing.assert_close(
        model.forward(params, tokens, cfg), logits_by_torch(params, tokens, cfg), rtol=1e-11, atol=1e-11
    )


def test_every_parameter_receives_a_gradient() -> None:
    cfg = config(positions="learned", activation="swiglu", bias=True, kv_heads=2, qk_norm=True, attention_cap=5.0)
    params, tokens, labels = sample(cfg)
    leaves = {name: value.requires_grad_() for name, value in params.items()}
    model.loss(leaves, tokens, labels, cfg, 1e-2).backward()
    without = [name for name, leaf in leaves.items() if leaf.grad is None or not leaf.grad.any()]
    assert without == []


def test_parameter_count_of_a_gpt() -> None:
    """12 L h^2 + V h for a GPT with tied embeddings and no biases, plus 2 L + 1 norms of h."""
    cfg = config(layers=3, hidden=64, heads=4, ffn_hidden=None, tied_embeddings=True)
    count = sum(math.prod(shape) for shape in model.parameter_shapes(cfg, VOCAB).values())
    assert count == 12 * 3 * 64**2 + VOCAB * 64 + 7 * 64


def test_attention_cap_bounds_the_logits() -> None:
    """With one-hot queries and keys of size a, the logits are 0 and a^2/sqrt(d), so the softmax has a closed form."""
    cfg = config(hidden=4, heads=1, positions="none", attention_cap=3.0)
    a, d = 5.0, 4
    identity = torch.eye(d, dtype=torch.float64)
    params = {
        "a.qkv.weight": torch.cat([a * identity, a * identity, identity]),
        "a.proj.weight": identity,
    }
    x = torch.eye(d, dtype=torch.float64)[None, :2]  # token 0 = e0, token 1 = e1
    capped = 3.0 * math.tanh(a * a / math.sqrt(d) / 3.0)
    own = math.exp(capped) / (math.exp(capped) + 1)
    expected = torch.tensor([[[1, 0, 0, 0], [1 - own, own, 0, 0]]], dtype=torch.float64)
    torch.testing.assert_close(model.attention(params, "a", x, cfg), expected)


def test_a_huge_attention_cap_changes_nothing() -> None:
    params, tokens, _ = sample(config())
    torch.testing.assert_close(
        model.forward(params, tokens, config(attention_cap=1e6)), model.forward(params, tokens, config())
    )


def test_rotary_products_depend_on_relative_position_only() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    everywhere = torch.ones(1, 20, 1, 1, dtype=torch.float64)
    queries, keys = model.rotate(q * everywhere, 10000.0)[0, :, 0], model.rotate(k * everywhere, 10000.0)[0, :, 0]
    products = queries @ keys.T
    for offset in range(-19, 20):
        diagonal = products.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert products[0, 0] == pytest.approx(float(q @ k))
    assert abs(products[0, 5] - products[0, 0]) > 1e-3


def test_a_token_changes_no_earlier_logits() -> None:
    cfg = config(attention_cap=5.0, qk_norm=True)
    params, tokens, _ = sample(cfg)
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % VOCAB
    before, after = model.forward(params, tokens, cfg), model.forward(params, changed, cfg)
    assert torch.equal(before[:, :6], after[:, :6])
    assert ((before[:, 6:] - after[:, 6:]).abs().amax(-1) > 1e-6).all()


def test_without_positions_the_order_of_the_past_does_not_matter() -> None:
    """True of one block: from two on, the causal mask itself tells positions apart."""
    cfg = config(layers=1, positions="none")
    params, tokens, _ = sample(cfg)
    reversed_past = torch.cat([tokens[:, :-1].flip(1), tokens[:, -1:]], 1)
    last = model.forward(params, tokens, cfg)[:, -1]
    torch.testing.assert_close(model.forward(params, reversed_past, cfg)[:, -1], last)
    turned = model.forward(params, reversed_past, config(layers=1))[:, -1]
    assert not torch.allclose(turned, model.forward(params, tokens, config(layers=1))[:, -1])


def test_loss_is_cross_entropy_plus_z_loss() -> None:
    cfg = config()
    params, tokens, labels = sample(cfg)
    logits = model.forward(params, tokens, cfg)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(model.loss(params, tokens, labels, cfg), expected)
    torch.testing.assert_close(
        model.loss(params, tokens, labels, cfg, 0.3), expected + 0.3 * logits.logsumexp(-1).square().mean()
    )


def test_training_equals_torch_adamw() -> None:
    """Loss, gradient norm and parameters over five clipped steps with torch.optim.AdamW and torch's clipping."""
    cfg = Config(
        model=config(bias=True, qk_norm=True).model_dump(),
        optimizer={"learning_rate": 0.01, "weight_decay": 0.3, "clip_grad": 0.5},
        schedule={"kind": "constant", "warmup_steps": 3},
        loss={"z_loss": 1e-3},
    )
    params, _, _ = sample(cfg.model)
    batches = [sample(cfg.model, seed=step)[1:] for step in range(5)]
    trained = optimizer.train(params, batches, cfg, 5)

    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    adamw = torch.optim.AdamW(
        [
            {"params": [leaf for leaf in leaves.values() if leaf.ndim >= 2], "weight_decay": 0.3},
            {"params": [leaf for leaf in leaves.values() if leaf.ndim == 1], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    warmup = torch.optim.lr_scheduler.LambdaLR(adamw, lambda done: min(1.0, (done + 1) / 3))
    for step, (tokens, labels) in enumerate(batches):
        loss = model.loss(leaves, tokens, labels, cfg.model, 1e-3)
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(leaves.values()), 0.5)
        assert trained.losses[step] == pytest.approx(loss.item(), rel=1e-10)
        assert trained.grad_norms[step] == pytest.approx(norm.item(), rel=1e-10)
        assert norm > 0.5, "the step does not clip"
        adamw.step()
        warmup.step()
    assert trained.learning_rates == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01, 0.01])
    for name, leaf in leaves.items():
        torch.testing.assert_close(trained.parameters[name], leaf.detach(), rtol=1e-9, atol=1e-12, msg=name)
        assert not torch.equal(leaf, params[name]), name


@pytest.mark.parametrize("limit", [0.5, 1e3])
def test_clipping_equals_torch(limit: float) -> None:
    """On its own, because Adam hides a gradient's scale."""
    params, _, _ = sample(config())
    leaves = [value.clone().requires_grad_() for value in params.values()]
    for leaf, value in zip(leaves, params.values(), strict=True):
        leaf.grad = value.clone()
    expected_norm = torch.nn.utils.clip_grad_norm_(leaves, limit)
    clipped, norm = optimizer.clip(params, limit)
    assert norm == pytest.approx(expected_norm.item(), rel=1e-12)
    for leaf, gradient in zip(leaves, clipped.values(), strict=True):
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(optimizer.clip(params, 0)[0].values(), params.values(), strict=True))


def test_training_learns_a_batch_by_heart() -> None:
    cfg = Config(
        model=config().model_dump(),
        run={"steps": 60},
        optimizer={"learning_rate": 0.01},
        schedule={"kind": "cosine", "warmup_steps": 5, "min_learning_rate": 0.0},
    )
    params, tokens, labels = sample(cfg.model)
    trained = optimizer.train(params, [(tokens, labels)] * 60, cfg, 60)
    assert trained.losses[0] > 3.0
    assert trained.losses[-1] < 0.5


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", {5: 0.5, 10: 1.0, 100: 1.0}),
        ("linear", {5: 0.5, 10: 1.0, 55: 0.6, 100: 0.2}),
        ("cosine", {5: 0.5, 10: 1.0, 55: 0.6, 100: 0.2, 40: 0.2 + 0.8 * 0.75}),
        ("wsd", {5: 0.5, 10: 1.0, 80: 1.0, 90: 0.6, 100: 0.2}),
        ("inverse_sqrt", {5: 0.5, 10: 1.0, 40: 0.5, 90: 1 / 3, 100: 10**-0.5}),
    ],
)
def test_schedules_at_known_steps(kind: str, expected: dict[int, float]) -> None:
    cfg = Config(
        run={"steps": 100},
        optimizer={"learning_rate": 1.0},
        schedule={"kind": kind, "warmup_steps": 10, "min_learning_rate": 0.2, "decay_fraction": 0.2},
    )
    assert {step: optimizer.learning_rate(step, cfg) for step in expected} == pytest.approx(expected)


def test_inverse_sqrt_stops_at_the_minimum() -> None:
    cfg = Config(
        run={"steps": 10**6},
        optimizer={"learning_rate": 1.0},
        schedule={"kind": "inverse_sqrt", "warmup_steps": 0, "min_learning_rate": 0.2},
    )
    assert optimizer.learning_rate(1, cfg) == 1.0
    assert optimizer.learning_rate(16, cfg) == 0.25
    assert optimizer.learning_rate(10**6, cfg) == 0.2
