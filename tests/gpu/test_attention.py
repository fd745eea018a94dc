"""Attention on a GPU: backends with and without a cap, flash-attn tried out, the kernel of the largest logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_stable.config.schema import Config, ModelConfig
from megatron_stable.model import flash
from megatron_stable.model.backends import BACKENDS, SEEN, sdpa_kernel
from megatron_stable.model.documents import document_starts
from megatron_stable.model.largest_logits import by_chunks, by_kernel, max_attention_logits, usable
from megatron_stable.model.scores import Scores

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CUDA = torch.device("cuda")
BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 5e-3}
NO_FLASH = "flash-attn is not installed"


def draw(dtype: torch.dtype, heads: int, kv_heads: int, length: int, width: int, scale: float = 1.0) -> list[Tensor]:
    """q, k, v and a direction, [b, heads, s, d], heads of a position side by side, as attention has them."""
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        (factor * torch.randn(2, length, n, width, device="cuda", generator=generator)).to(dtype).transpose(1, 2)
        for n, factor in zip((heads, kv_heads, kv_heads, heads), (scale, scale, 1, 1), strict=True)
    ]


def compare(
    name: str,
    dtype: torch.dtype,
    cap: float | None,
    kv_heads: int,
    length: int,
    width: int,
    starts: Tensor | None = None,
) -> None:
    q, k, v, upstream = draw(dtype, 8, kv_heads, length, width, 3.0)  # logits of tens, which the cap bends
    half = [x.requires_grad_() for x in (q, k, v)]
    wide = [x.detach().double().requires_grad_() for x in half]
    scores = Scores(width**-0.5, cap)
    fused, plain = ((SEEN[each](starts, CUDA),) if starts is not None else () for each in (name, "math"))
    found = BACKENDS[name](*half, scores, 0.0, *fused)  # type: ignore[call-arg, arg-type]
    wanted = BACKENDS["math"](*wide, scores, 0.0, *plain)  # type: ignore[call-arg, arg-type]
    gradients = zip(
        (found, *torch.autograd.grad(found, half, upstream)),
        (wanted, *torch.autograd.grad(wanted, wide, upstream.double())),
        strict=True,
    )
    for one, other in gradients:
        assert (one.double() - other).norm() / other.norm() < BOUNDS[dtype]


@pytest.mark.parametrize("width", [64, 88, 128])
@pytest.mark.parametrize("length", [384, 200])  # the second is no multiple of a block
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize(("name", "cap"), [("sdpa", None), ("flex", None), ("flex", 5.0), ("flex", 50.0)])
def test_pytorch_s_backends_equal_math(name: str, cap: float | None, kv_heads: int, length: int, width: int) -> None:
    compare(name, torch.bfloat16, cap, kv_heads, length, width)


def documents(length: int) -> Tensor:
    """Where documents begin, some within a block of 128, some as long as several."""
    tokens = torch.ones(2, length, dtype=torch.int64)
    for row, places in enumerate(([0, 3, 4, 40, 127, 128, 200], [130, 131, 290])):
        tokens[row, [place for place in places if place < length]] = 0
    return document_starts(tokens, 0)


@pytest.mark.parametrize("length", [384, 200])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize(("name", "cap"), [("sdpa", None), ("flex", None), ("flex", 5.0)])
def test_pytorch_s_backends_equal_math_within_documents(
    name: str, cap: float | None, kv_heads: int, length: int
) -> None:
    compare(name, torch.bfloat16, cap, kv_heads, length, 64, documents(length))


@pytest.mark.skipif(flash.module(dropout=False) is None, reason=NO_FLASH)
@pytest.mark.parametrize("cap", [None, 5.0])
def test_flash_attention_equals_math_within_documents(cap: float | None) -> None:
    compare("flash", torch.bfloat16, cap, 2, 384, 64, documents(384))


@pytest.mark.skipif(flash.module(dropout=False) is None, reason=NO_FLASH)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("cap", [None, 5.0, 50.0])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_flash_attention_equals_math(dtype: torch.dtype, cap: float | None, kv_heads: int) -> None:
    # its tanh is off by 2^-11 of a logit of up to the cap, and probabilities by as much as their logits
    compare("flash", dtype, cap, kv_heads, 384, 64)


@pytest.mark.skipif(flash.module(dropout=False) is None, reason=NO_FLASH)
@pytest.mark.parametrize("compiled", [False, True])
def test_flash_attention_is_usable_where_it_works(compiled: bool) -> None:
    model = ModelConfig(recipe="qk_norm_cap", compile=compiled)
    found = flash.try_out(model, torch.bfloat16, CUDA)
    assert found.usable, found.sentence


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper")
def test_on_hopper_sdpa_is_cudnn_s() -> None:
    """From cuDNN 9.15.1 on PyTorch prefers it; in deterministic mode it cannot."""
    if (torch.backends.cudnn.version() or 0) <= 91500:
        pytest.skip("PyTorch leaves out cuDNN before 9.15.1")
    model = ModelConfig(size="302m", vocab_size=64)
    assert sdpa_kernel(model, torch.bfloat16, CUDA) == "cudnn_attention"
    torch.use_deterministic_algorithms(True)
    try:
        assert sdpa_kernel(model, torch.bfloat16, CUDA) == "flash_attention"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_run_says_which_kernel_it_takes() -> None:
    import torch.distributed as dist

    from megatron_stable.training.kernels import choose_attention

    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        precision = {"dtype": "bf16"}
        plain = choose_attention(Config.model_validate({"model": {"recipe": "qk_norm"}, "precision": precision}))
        capped = choose_attention(Config.model_validate({"model": {"recipe": "qk_norm_cap"}, "precision": precision}))
    finally:
        flash.take(False)
        if own:
            dist.destroy_process_group()
    assert plain.name == "sdpa" and "_attention" in plain.reason
    assert capped.name == ("flex" if flash.module(dropout=False) is None else "flash"), capped


@pytest.mark.parametrize("width", [16, 64, 88, 128, 256])
@pytest.mark.parametrize("length", [1, 200, 1024])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_the_largest_logits_equal_float64(dtype: torch.dtype, kv_heads: int, length: int, width: int) -> None:
    q, k, *_ = draw(dtype, 8, kv_heads, length, width)
    assert usable(q.device, dtype, width), "Triton does not work: PyTorch would be compared with itself"
    torch.testing.assert_close(by_kernel(q, k).double(), by_chunks(q.double(), k.double()), rtol=1e-5, atol=1e-5)


def test_the_largest_logits_hold_nothing_and_give_the_same_bits() -> None:
    q, k, *_ = draw(torch.bfloat16, 16, 16, 4096, 128)
    first = max_attention_logits(q, k, 0.1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert torch.equal(max_attention_logits(q, k, 0.1), first)
    assert torch.cuda.max_memory_allocated() - before < 2**20
    compiled = torch.compile(max_attention_logits, fullgraph=True, dynamic=False)
    assert torch.equal(compiled(q, k, 0.1), first)
