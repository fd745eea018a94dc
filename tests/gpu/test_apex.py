"""NVIDIA's apex beside PyTorch, on a GPU where it is installed: ``pytest -o addopts= tests/gpu -s``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from megatron_stable import apex
from megatron_stable.config.schema import ModelConfig
from megatron_stable.model.norms import Norm
from megatron_stable.optim.adamw import Flat, adamw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not apex.find().usable, reason=apex.find().sentence),
]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(apex, "_taken", None)
    assert apex.try_out(torch.device("cuda")).usable
    apex.take()
    yield


def flat(seed: int, size: int, group: dict[str, object]) -> Flat:
    generator = torch.Generator("cuda").manual_seed(seed)
    weight = torch.randn(size, device="cuda", generator=generator)
    state = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
    return Flat(weight, torch.empty_like(weight), {**state, "step": torch.zeros((), device="cuda")}, group)


@pytest.mark.parametrize("clip", [None, 1.0, 3.7])
@pytest.mark.parametrize("decay", [0.0, 0.1, 1e-4 / 3e-4])  # the last as independent weight decay sets it
def test_adamw_is_pytorchs(taken: None, monkeypatch: pytest.MonkeyPatch, decay: float, clip: float | None) -> None:
    divisor = None if clip is None else torch.full((), clip, device="cuda")
    group: dict[str, object] = {"betas": (0.9, 0.95), "eps": 1e-15, "weight_decay": decay}
    theirs, ours = ([flat(seed, 70_001 + seed, group) for seed in range(3)] for _ in range(2))
    generator = torch.Generator("cuda").manual_seed(9)
    for step in range(1, 21):
        group["lr"] = 1e-2 / step
        for a, b in zip(theirs, ours, strict=True):
            a.grad.normal_(generator=generator)
            b.grad.copy_(a.grad)
        adamw(theirs, step, divisor)
        with monkeypatch.context() as patch:
            patch.setattr(apex, "_taken", None)
            adamw(ours, step, divisor)
    for a, b in zip(theirs, ours, strict=True):
        assert a.state["step"] == b.state["step"] == 20
        for x, y in ((a.weight, b.weight), *((a.state[k], b.state[k]) for k in ("exp_avg", "exp_avg_sq"))):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rms_norm_is_pytorchs(taken: None, dtype: torch.dtype, close: float) -> None:
    config = ModelConfig.model_validate({"norm": "rmsnorm", "vocab_size": 61})
    norm = Norm(4096, config, partial=False).to("cuda", dtype)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(8, 64, 4096, device="cuda", dtype=dtype, requires_grad=True)
    upstream = torch.randn_like(x)
    found = torch.autograd.grad(norm(x), (x, norm.weight), upstream)
    y = F.rms_norm(x, (4096,), norm.weight, norm.eps)
    expected = torch.autograd.grad(y, (x, norm.weight), upstream)
    for a, b in zip((norm(x), *found), (y, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=close, atol=close * float(b.abs().max()))
