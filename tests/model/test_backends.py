"""What recipes do to attention: clips, temperatures, caps."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_stable.config.parametrization import ModelMultipliers
from megatron_stable.config.schema import ModelConfig
from megatron_stable.errors import ConfigError
from megatron_stable.model.attention import Attention
from megatron_stable.model.backends import BACKENDS, choose_backend
from megatron_stable.model.elementwise import soft_cap
from megatron_stable.model.scores import Scores
from megatron_stable.parallel.topology import TensorParallel

PLAIN = Scores(0.25)


def tensors(kv_heads: int, length: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(kv_heads)
    heads = (4, kv_heads, kv_heads)
    q, k, v = (torch.randn(2, n, length, 16, dtype=torch.float64, generator=generator) for n in heads)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def query_by_query(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """One query at a time, over the keys that it may see: no mask."""
    heads = []
    for head in range(q.shape[1]):
        keys, values = (x[:, head // (q.shape[1] // k.shape[1])] for x in (k, v))
        rows = []
        for i in range(q.shape[2]):
            logits = (keys[:, : i + 1] * q[:, head, i, None]).sum(-1) * scores.scale
            if scores.cap is not None:
                logits = scores.cap * (1 - 2 / ((2 * logits / scores.cap).exp() + 1))
            weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
            if scores.clip is not None:
                low, high = scores.clip
                weights = low + (high - low) * weights
                weights = torch.where(weights < 0, 0.0, torch.where(weights > 1, 1.0, weights))
            rows.append((weights[..., None] * values[:, : i + 1]).sum(1))
        heads.append(torch.stack(rows, 1))
    return torch.stack(heads, 1)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("backend", "scores"),
    [
        ("math", Scores(0.7, cap=2.0)),
        ("math", Scores(0.4, clip=(-0.1, 1.2))),
        ("math", Scores(1.1, cap=3.0, clip=(-0.03, 1.03))),
        ("sdpa", Scores(0.7)),
    ],
)
def test_scores_equal_the_loop_with_gradients(backend: str, scores: Scores, kv_heads: int) -> None:
    found, wanted = (f(*tensors(kv_heads), scores) for f in (lambda *a: BACKENDS[backend](*a, 0.0), query_by_query))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    ours, theirs = tensors(kv_heads), tensors(kv_heads)
    direction = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    gradients = torch.autograd.grad((BACKENDS[backend](*ours, scores, 0.0) * direction).sum(), ours)
    references = torch.autograd.grad((query_by_query(*theirs, scores) * direction).sum(), theirs)
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-9)


def probabilities(q: Tensor, k: Tensor, scores: Scores) -> Tensor:
    length = q.shape[2]
    return BACKENDS["math"](q, k, torch.eye(length, dtype=q.dtype).expand(*q.shape[:2], length, length), scores, 0.0)


def test_clipped_probabilities_reach_zero_and_one_and_masked_ones_stay_zero() -> None:
    q, k = 3 * torch.randn(2, 1, 2, 12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain, clipped = (
        probabilities(q, k, PLAIN),
        probabilities(q, k, Scores(0.25, None, (-0.03, 1.03))),
    )
    assert (clipped.triu(1) == 0).all(), "a masked entry is not zero"
    seen = torch.ones(12, 12, dtype=torch.bool).tril().expand_as(plain)
    assert ((clipped == 0) & seen & (plain > 0)).any() and ((clipped == 1) & (plain < 1)).any()
    torch.testing.assert_close(clipped, (1.06 * plain - 0.03).clamp(0, 1))


def test_temperature_is_a_factor_of_the_logits() -> None:
    q, k, v = tensors(2)
    for backend in ("math", "sdpa"):
        wanted = BACKENDS[backend](0.5 * q, k, v, PLAIN, 0.0)
        torch.testing.assert_close(BACKENDS[backend](q, k, v, Scores(0.125), 0.0), wanted)
    cfg = ModelConfig(recipe="soft_temp", hidden=64, heads=4)
    assert Attention(cfg, TensorParallel(), "sdpa", ModelMultipliers(0.25)).scores == Scores(0.125)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=20, unique=True), st.floats(0.5, 100.0))
def test_caps_bound_logits_keep_their_order_and_leave_small_ones_alone(logits: list[float], cap: float) -> None:
    x = torch.tensor(logits, dtype=torch.float64).sort().values
    y = soft_cap(x, cap)
    assert (y.abs() <= cap).all() and (y.diff() >= 0).all() and (y * x >= 0).all()
    apart = (x.diff() > 1e-6 * cap) & (x[1:].abs() < 5 * cap) & (x[:-1].abs() < 5 * cap)
    assert (y.diff()[apart] > 0).all(), "logits that the cap does not saturate became equal"
    small = x * 1e-4 * cap / 1e4
    torch.testing.assert_close(soft_cap(small, cap), small, rtol=1e-7, atol=1e-300)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 300.0), st.floats(0.5, 20.0))
def test_capped_attention_never_gets_surer_than_the_cap_allows(seed: int, scale: float, cap: float) -> None:
    """Logits within +-c: of n keys none has more than e^2c / (e^2c + n - 1)."""
    q, k = torch.randn(2, 1, 2, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale
    found = probabilities(q, k, Scores(0.25, cap))
    n = torch.arange(1, 9, dtype=torch.float64)
    assert (found.amax(-1) <= 1 / (1 + (n - 1) * torch.tensor(-2 * cap, dtype=torch.float64).exp()) + 1e-12).all()


@pytest.mark.parametrize(
    ("fields", "cpu", "cuda"),
    [
        ({"recipe": "soft_temp"}, "sdpa", "sdpa"),
        ({"recipe": "qkv_norm"}, "sdpa", "sdpa"),
        ({"recipe": "gemma2"}, "math", "flex"),
        ({"recipe": "soft_clip"}, "math", "math"),
        ({"recipe": "soft_clip", "attention_cap": 30.0}, "math", "math"),
        ({"attention_cap": 30.0, "hidden": 32}, "math", "math"),  # heads of 8: fewer than FlexAttention takes
    ],
)
def test_choice_of_backend_says_why(fields: dict[str, object], cpu: str, cuda: str) -> None:
    config = ModelConfig(**fields)  # type: ignore[arg-type]
    choices = choose_backend(config, "cpu"), choose_backend(config, "cuda")
    assert tuple(choice.name for choice in choices) == (cpu, cuda)
    for choice in choices:
        assert len(choice.reason.split()) > 3
        if choice.name == "math":
            assert "model.attention_" in choice.reason, "the reason does not name the knob"


def test_flash_needs_its_package_and_a_gpu() -> None:
    config = ModelConfig(attention="flash", recipe="qk_norm_cap")
    with pytest.raises(ConfigError, match=r"model\.attention flash needs a CUDA GPU.*model\.attention=auto"):
        choose_backend(config, "cpu")
    if find_spec("flash_attn") is None:
        with pytest.raises(ConfigError, match=r"model\.attention flash needs the package flash-attn"):
            choose_backend(config, "cuda")
    else:
        assert choose_backend(config, "cuda").name == "flash"
