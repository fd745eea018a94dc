"""flash-attn's adapter and how it is tried out, by a stand-in of its signature; its own numbers are in tests/gpu."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import invalidate_caches
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_stable.apex import Found
from megatron_stable.config.schema import Config, ModelConfig
from megatron_stable.model import flash
from megatron_stable.model.backends import Choice, choose_backend, sdpa_kernel
from megatron_stable.model.scores import Scores, math_attention, visible
from tests.harness.ranks import Ranks

CPU = torch.device("cpu")
CAPPED = {"hidden": 64, "heads": 4, "kv_heads": 2, "attention_cap": 10.0}
# of FlashAttention-2, [b, s, heads, d]; what a test breaks is replaced in it
STAND_IN = """
import torch
from torch.nn.functional import dropout

def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                    alibi_slopes=None, deterministic=False, return_attn_probs=False):
    share = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(share, 2), v.repeat_interleave(share, 2)
    logits = torch.einsum("bihd,bjhd->bhij", q.float(), k.float()) * softmax_scale
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    weights = dropout(logits.masked_fill(future & causal, -torch.inf).softmax(-1), dropout_p)
    return torch.einsum("bhij,bjhd->bihd", weights.to(v.dtype), v)

def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                           deterministic=False, return_attn_probs=False, block_table=None):
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    logits = torch.einsum("ihd,jhd->hij", q.float(), k.float()) * softmax_scale
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    place = torch.arange(len(q))
    of = torch.bucketize(place, cu_seqlens_q[1:], right=True)
    hidden = (place > place[:, None]) & causal | (of != of[:, None])
    weights = dropout(logits.masked_fill(hidden, -torch.inf).softmax(-1), dropout_p)
    return torch.einsum("hij,jhd->ihd", weights.to(v.dtype), v)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Install the stand-in, with replacements in its text."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(flash, "_KERNELS", {})
    monkeypatch.setattr(flash, "_taken", False)

    def write(*replaced: tuple[str, str], name: str = "flash_attn") -> None:
        text = STAND_IN
        for old, new in replaced:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / f"{name}.py").write_text(text)

    torch._dynamo.reset()  # which has had other stand-ins
    yield write
    for name in flash.VERSIONS:
        sys.modules.pop(name, None)


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(2, heads, 20, 16, generator=generator) for heads in (4, 2, 2)]


@pytest.mark.parametrize("cap", [None, 5.0])
def test_layouts_and_arguments_are_those_of_the_package(install: Callable[..., None], cap: float | None) -> None:
    install()
    q, k, v = tensors()
    scores = Scores(0.7, cap)
    found = flash.flash_attention(q, k, v, scores, 0.0)
    torch.testing.assert_close(found, math_attention(q, k, v, scores, 0.0))
    dropped = flash.flash_attention(q, k, v, scores, 0.5)
    assert not torch.allclose(dropped, found) and dropped.isfinite().all()


@pytest.mark.parametrize("cap", [None, 5.0])
def test_documents_of_all_rows_are_sequences(install: Callable[..., None], cap: float | None) -> None:
    install()
    tensors_, scores = tensors(), Scores(0.7, cap)
    starts = torch.tensor([[0] * 6 + [6] * 14, [0] + [1] * 2 + [3] * 17])
    for dropout in (0.0, 0.5):
        found = flash.flash_attention(*tensors_, scores, dropout, flash.document_ends(starts, CPU))
        wanted = math_attention(*tensors_, scores, 0.0, visible(starts, CPU))
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4) == (not dropout)


@pytest.mark.parametrize(
    ("old", "new"), [("| (of != of[:, None])", ""), ("causal | (of", "False | (of"), ("right=True", "right=False")]
)
def test_what_takes_documents_for_others_is_not_usable(install: Callable[..., None], old: str, new: str) -> None:
    install()
    model = ModelConfig(**CAPPED)  # type: ignore[arg-type]
    assert flash.try_out(model, torch.bfloat16, CPU, documents=True).usable
    sys.modules.pop("flash_attn")
    flash._KERNELS.clear()
    torch._dynamo.reset()
    install((old, new))
    invalidate_caches()
    assert "computes attention otherwise" in flash.try_out(model, torch.bfloat16, CPU, documents=True).sentence


def test_version_3_has_no_dropout_and_returned_two_things_once(install: Callable[..., None]) -> None:
    install(
        ("dropout_p=0.0, ", ""),
        ("dropout(logits.masked_fill(future & causal, -torch.inf).softmax(-1), dropout_p)",
         "logits.masked_fill(future & causal, -torch.inf).softmax(-1)"),
        ("weights.to(v.dtype), v)", "weights.to(v.dtype), v), logits.logsumexp(-1)"),
        name="flash_attn_interface",
    )  # fmt: skip
    assert flash.module(dropout=False) is None or torch.cuda.get_device_capability()[0] == 9
    flash._KERNELS[False, False] = __import__("flash_attn_interface").flash_attn_func  # as on Hopper
    q, k, v = tensors()
    torch.testing.assert_close(
        flash.flash_attention(q, k, v, Scores(0.7, 5.0), 0.0), math_attention(q, k, v, Scores(0.7, 5.0), 0.0)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_agrees_is_usable(install: Callable[..., None], dtype: torch.dtype) -> None:
    install()
    found = flash.try_out(ModelConfig(**CAPPED), dtype, CPU)  # type: ignore[arg-type]
    assert found == Found(True, "FlashAttention-2")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("if softcap else logits", "if False else logits", "computes attention otherwise"),
        ("future & causal", "future & False", "computes attention otherwise"),
        ("triu(1)", "triu(2)", "computes attention otherwise"),
        ("softcap=0.0,", "", "TypeError: .*softcap"),
        ("share = ", "raise RuntimeError('no kernel image'); share = ", "does not work here .RuntimeError: no kernel"),
        ("weights.to(v.dtype), v)", "weights.to(v.dtype), v) * torch.nan", "computes attention otherwise"),
        ("import torch\n", "import no_such_extension\n", "does not work here .ModuleNotFoundError"),
    ],
)
def test_what_does_not_is_not_and_it_is_said(install: Callable[..., None], old: str, new: str, said: str) -> None:
    install((old, new))
    found = flash.try_out(ModelConfig(**CAPPED), torch.bfloat16, CPU)  # type: ignore[arg-type]
    assert not found.usable and not found.absent
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(found.sentence)


def test_what_breaks_a_graph_is_not_for_compiled_blocks(install: Callable[..., None]) -> None:
    install(("share = ", "torch._dynamo.graph_break(); share = "))
    plain, compiled = (ModelConfig(**CAPPED, compile=on) for on in (False, True))  # type: ignore[arg-type]
    assert flash.try_out(plain, torch.bfloat16, CPU).usable
    assert "does not work here" in flash.try_out(compiled, torch.bfloat16, CPU).sentence


def test_what_breaks_none_is(install: Callable[..., None]) -> None:
    install()
    assert flash.try_out(ModelConfig(**CAPPED, compile=True), torch.bfloat16, CPU).usable  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "cuda"),
    [
        ({"attention_cap": 30.0}, "flash"),
        ({"attention_cap": 30.0, "hidden": 32}, "flash"),  # heads of 8, too few for FlexAttention
        ({}, "sdpa"),
        ({"attention_cap": 30.0, "attention_dropout": 0.1}, "math"),
        ({"attention_cap": 30.0, "attention_clip": (-0.03, 1.0)}, "math"),
        ({"attention_cap": 30.0, "attention": "flex"}, "flex"),
    ],
)
def test_when_taken_it_is_for_caps_on_gpus(fields: dict[str, Any], cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(**fields)
    monkeypatch.setattr(flash, "_taken", True)
    choice = choose_backend(config, "cuda")
    assert choice.name == cuda and len(choice.reason.split()) > 3
    if config.attention == "auto":
        assert choose_backend(config, "cpu").name == ("sdpa" if config.attention_cap is None else "math")


def verdict(usable: list[bool]) -> Found:
    import torch.distributed as dist

    from megatron_stable.training.kernels import _on_all_ranks

    mine = usable[dist.get_rank()]
    return _on_all_ranks(Found(mine, f"rank {dist.get_rank()} {'can' if mine else 'cannot'}", absent=not mine))


@pytest.mark.parametrize("usable", [[True, True], [True, False], [False, False]])
def test_all_ranks_take_it_or_none(ranks: Ranks, usable: list[bool]) -> None:
    found = ranks.run(2, verdict, usable)
    assert [each.usable for each in found] == [all(usable)] * 2
    if not all(usable):
        assert found[0] == found[1] and f"rank {usable.index(False)} cannot (on " in found[0].sentence
        assert found[0].absent == (not any(usable))


def chosen(model: dict[str, Any]) -> Choice:
    from megatron_stable.training.kernels import choose_attention

    return choose_attention(Config.model_validate({"model": model}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_tried_out(ranks: Ranks) -> None:
    capped, plain = (ranks.run(2, chosen, model)[1] for model in ({"recipe": "qk_norm_cap"}, {"recipe": "qk_norm"}))
    assert (capped.name, plain.name) == ("math", "sdpa") and "flash-attn" not in plain.reason


def test_sdpa_says_which_of_its_kernels_it_takes() -> None:
    names = [
        sdpa_kernel(ModelConfig(hidden=64, heads=4, kv_heads=2, attention_dropout=dropout), torch.float32, CPU)
        for dropout in (0.0, 0.1)
    ]
    assert names == ["flash_attention", "math"]
