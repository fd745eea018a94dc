"""Attention backends on the CPU against a loop over queries in float64, and which backend is chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_stable.config.schema import ModelConfig
from megatron_stable.errors import ConfigError
from megatron_stable.model.backends import BACKENDS, choose_backend
from megatron_stable.model.scores import Scores

SCALE = 16**-0.5  # heads are 16 wide
CASES = [("math", None), ("math", 2.0), ("sdpa", None)]


def query_by_query(q: Tensor, k: Tensor, v: Tensor, cap: float | None) -> Tensor:
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    share = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        keys, values = k[:, head // share], v[:, head // share]
        for position in range(q.shape[2]):
            logits = torch.einsum("bd,bjd->bj", q[:, head, position], keys[:, : position + 1]) / q.shape[-1] ** 0.5
            if cap is not None:
                logits = cap * torch.tanh(logits / cap)
            out[:, head, position] = torch.einsum("bj,bjd->bd", logits.softmax(-1), values[:, : position + 1])
    return out


def tensors(dtype: torch.dtype, kv_heads: int, length: int = 9, scale: float = 1.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(kv_heads)
    shapes = ((2, 4, length, 16), (2, kv_heads, length, 16), (2, kv_heads, length, 16))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return tuple((x * scale).to(dtype).requires_grad_() for x in (q, k)) + (v.to(dtype).requires_grad_(),)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("backend", "cap"), CASES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_backends_equal_the_loop(
    backend: str, cap: float | None, kv_heads: int, dtype: torch.dtype, bound: float
) -> None:
    given = tensors(dtype, kv_heads)
    wide = tuple(x.detach().double().requires_grad_() for x in given)
    found, wanted = BACKENDS[backend](*given, Scores(SCALE, cap), 0.0), query_by_query(*wide, cap)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=bound)
    direction = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    gradients = torch.autograd.grad((found.double() * direction).sum(), given)
    for gradient, reference in zip(gradients, torch.autograd.grad((wanted * direction).sum(), wide), strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=10 * bound, atol=10 * bound)


@pytest.mark.parametrize(("backend", "cap"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_loses_no_more_than_the_rounding_of_the_output(
    backend: str, cap: float | None, dtype: torch.dtype
) -> None:
    given = tensors(dtype, 4, length=64, scale=3.0)  # logits of several tens: rounded to bf16 they are off by 0.1
    found = BACKENDS[backend](*given, Scores(SCALE, cap), 0.0)
    wanted = query_by_query(*(x.detach().double() for x in given), cap)
    assert found.dtype == dtype
    assert (found.double() - wanted).norm() / wanted.norm() < torch.finfo(dtype).eps / 2


def test_large_fp16_products_do_not_overflow() -> None:
    q, k, v = (x.detach() for x in tensors(torch.float16, 4, scale=100.0))  # q k up to 4e5, beyond fp16's 65504
    wanted = query_by_query(q.double(), k.double(), v.double(), 50.0)
    torch.testing.assert_close(
        BACKENDS["math"](q, k, v, Scores(SCALE, 50.0), 0.0).double(), wanted, rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_attention_dropout_drops_at_its_rate_and_scales_the_rest(backend: str) -> None:
    torch.manual_seed(0)
    length, rate = 64, 0.3
    q, k = torch.randn(2, 1, 8, length, 16).unbind()
    v = torch.eye(length).expand(1, 8, length, length)  # the output is the matrix of probabilities
    plain = BACKENDS[backend](q, k, v, Scores(SCALE), 0.0)
    dropped = BACKENDS[backend](q, k, v, Scores(SCALE), rate)
    seen = plain > 1e-6
    zero = (dropped == 0) & seen
    torch.testing.assert_close(
        dropped[~zero], torch.where(seen, plain / (1 - rate), plain)[~zero], rtol=1e-4, atol=1e-5
    )
    n = int(seen.sum())
    assert abs(float(zero.sum()) / n - rate) < 5 * (rate * (1 - rate) / n) ** 0.5


@pytest.mark.parametrize(
    ("fields", "cpu", "cuda"),
    [
        ({}, "sdpa", "sdpa"),
        ({"attention_dropout": 0.1}, "sdpa", "sdpa"),
        ({"recipe": "qk_norm"}, "sdpa", "sdpa"),
        ({"recipe": "qk_norm_cap"}, "math", "flex"),
        ({"attention_cap": 30.0}, "math", "flex"),
        ({"attention_cap": 30.0, "attention_dropout": 0.1}, "math", "math"),
        ({"attention_clip": (-0.03, 1.0)}, "math", "math"),
        ({"attention": "math"}, "math", "math"),
    ],
)
def test_choice_of_backend(fields: dict[str, object], cpu: str, cuda: str) -> None:
    config = ModelConfig(**fields)  # type: ignore[arg-type]
    assert (choose_backend(config, "cpu").name, choose_backend(config, "cuda").name) == (cpu, cuda)


def test_a_backend_that_does_not_train_on_the_cpu_is_refused_there() -> None:
    config = ModelConfig(attention="flex")
    assert choose_backend(config, "cuda").name == "flex"
    with pytest.raises(ConfigError, match=r"model\.attention flex needs a CUDA GPU.*set model\.attention=auto"):
        choose_backend(config, "cpu")
