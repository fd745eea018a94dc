"""Rows of several documents against each document run alone, in float64: values and gradients, by every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_stable.config.recipes import RECIPES
from megatron_stable.config.schema import Config, ModelConfig
from megatron_stable.model import flex
from megatron_stable.model.attention import Attention
from megatron_stable.model.backends import BACKENDS, SEEN, choose_backend
from megatron_stable.model.documents import DocumentMask, document_starts
from megatron_stable.model.peaks import Peaks
from megatron_stable.model.probes import Unprobed, attention_statistics
from megatron_stable.model.scores import Scores, visible
from megatron_stable.model.transformer import Transformer, layer_list
from megatron_stable.parallel.parameters import place
from megatron_stable.parallel.topology import TensorParallel
from tests.model.test_transformer import MODELS, VOCAB, config, filled
from tests.reference import documents as reference
from tests.reference import model as plain

END, CPU, ALONE = 7, torch.device("cpu"), TensorParallel()
OPTIMIZER = Config().optimizer
# at the beginning, in the middle, one behind the other, at the end, nowhere
ROWS = torch.tensor(
    [
        [7, 3, 9, 1, 7, 2, 4, 4, 60, 1, 5],
        [8, 3, 7, 7, 5, 1, 2, 9, 11, 3, 7],
        [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12],
    ]
)
STARTS = torch.tensor(
    [
        [0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4],
        [0, 0, 2, 3, 3, 3, 3, 3, 3, 3, 10],
        [0] * 11,
    ]
)


def masked(model: Transformer, cfg: ModelConfig) -> DocumentMask:
    return DocumentMask(model, cfg, END, CPU)


def test_a_document_begins_with_the_end_of_the_one_before_it() -> None:
    assert torch.equal(document_starts(ROWS, END), STARTS)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=3))
def test_starts_equal_the_loop(rows: list[list[int]]) -> None:
    tokens = torch.tensor(rows)
    for row, starts in zip(tokens, document_starts(tokens, 2), strict=True):
        found = [piece.start for piece in reference.pieces(row, 2) for _ in range(piece.start, piece.stop)]
        assert starts.tolist() == found


@pytest.mark.parametrize(
    ("fields", "recompute"),
    [*((fields, "none") for fields in MODELS.values()), ({}, "full")],
    ids=[*MODELS, "recomputed"],
)
@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_and_gradients_are_those_of_each_document_alone(
    recipe: str, fields: dict[str, Any], recompute: str
) -> None:
    cfg = config(recipe=recipe, activation_checkpointing=recompute, **fields)
    parameters = plain.draw_parameters(cfg, VOCAB, seed=5)
    model = filled(Transformer(layer_list(cfg, ALONE, seed=0, draw=False, documents=True)), parameters)
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    mask = masked(model, cfg)
    mask.announce(ROWS)
    found, wanted = model(ROWS)[..., :VOCAB], reference.forward(leaves, ROWS, cfg, END, OPTIMIZER)
    mask.announce(torch.zeros_like(ROWS))  # of the next micro batch, before this one's backward
    if cfg.final_logit_cap is not None:
        found = cfg.final_logit_cap * torch.tanh(found / cfg.final_logit_cap)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    direction = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (found * direction).sum().backward()
    (wanted * direction).sum().backward()
    gradients = {place(p).name: p.grad for p in model.parameters()}
    for name, leaf in leaves.items():
        gradient = gradients[name]
        assert gradient is not None and leaf.grad is not None
        scale = float(leaf.grad.abs().max())
        torch.testing.assert_close(gradient[: len(leaf)], leaf.grad, rtol=1e-5, atol=1e-6 * scale + 1e-9, msg=name)


def test_without_boundaries_nothing_changes_and_forgotten_ones_are() -> None:
    cfg = config(recipe="qk_norm")
    model = Transformer(layer_list(cfg, ALONE, seed=0, documents=True))
    unmasked, mask = model(ROWS), masked(model, cfg)
    mask.announce(ROWS)
    kept = model(ROWS)
    assert not torch.allclose(kept[0, 5:], unmasked[0, 5:]) and not torch.allclose(kept[1, 4:], unmasked[1, 4:])
    torch.testing.assert_close(kept[2], unmasked[2])
    torch.testing.assert_close(kept[0, :4], unmasked[0, :4])
    mask.forget()
    assert torch.equal(model(ROWS), unmasked)


def test_what_is_in_one_document_changes_nothing_in_others() -> None:
    cfg = config(recipe="qk_norm_cap", positions="learned")
    model = Transformer(layer_list(cfg, ALONE, seed=0, documents=True))
    mask, changed = masked(model, cfg), ROWS.clone()
    changed[0, 2], changed[1, 5] = 33, 34

    def logits(tokens: Tensor) -> Tensor:
        mask.announce(tokens)
        return model(tokens)

    before, after = logits(ROWS), logits(changed)
    apart = (before != after).any(-1)
    assert apart.nonzero().tolist() == [[0, 2], [0, 3], *([1, i] for i in range(5, 10))]


def drawn(length: int, width: int = 16, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, length, width, generator=generator) for n in (4, kv_heads, kv_heads))
    return q, k, v


def spread(length: int) -> Tensor:
    """Starts of documents of many lengths, some longer than a block of 128, in two rows."""
    tokens = torch.ones(2, length, dtype=torch.int64)
    for row, places in enumerate(([0, 3, 4, 40, 127, 128, 200, 384], [130, 131, 290])):
        tokens[row, [p for p in places if p < length]] = END
    return document_starts(tokens, END)


@pytest.mark.parametrize("length", [11, 128, 200, 400, 512])
def test_flex_s_blocks_are_those_that_the_mask_has(length: int) -> None:
    """Those that are said to be whole are seen whole, the others in part, and none that is left out is seen."""
    starts = spread(length)
    mask, seen = SEEN["flex"](starts, CPU), visible(starts, CPU)[:, 0]
    blocks = -(-length // 128)
    for row in range(2):
        for i in range(blocks):
            whole, some = (
                set(indices[row, 0, i, : int(numbers[row, 0, i])].tolist())
                for numbers, indices in (
                    (mask.full_kv_num_blocks, mask.full_kv_indices),
                    (mask.kv_num_blocks, mask.kv_indices),
                )
            )
            for j in range(blocks):
                part = seen[row, 128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
                # the last block is cut off, and may be taken for one that is seen in part
                assert (j in whole) <= bool(part.all()) and bool(part.any()) == (j in whole or j in some)
                assert not (j in whole and j in some)
                if part.shape == (128, 128):
                    assert bool(part.all()) == (j in whole)
    places = torch.arange(length)
    found = mask.mask_mod(torch.arange(2)[:, None, None], 0, places[:, None], places)
    assert torch.equal(found, seen)


@pytest.mark.parametrize("scores", [Scores(0.25), Scores(0.3, cap=2.0)], ids=["plain", "capped"])
@pytest.mark.parametrize("length", [11, 200, 400])
def test_flex_attention_equals_math(length: int, scores: Scores) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    from megatron_stable.model.flex import _score_mod

    starts, (q, k, v) = spread(length), drawn(length)
    found = flex_attention(
        q, k, v, _score_mod(scores.cap) if scores.cap else None, SEEN["flex"](starts, CPU), scores.scale, True
    )
    wanted = BACKENDS["math"](q, k, v, scores, 0.0, SEEN["math"](starts, CPU))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def by_tiles(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Any, safe: bool) -> Tensor:
    """Attention as PyTorch's kernel for a GPU computes it (flex_attention.py.jinja): a block of queries takes one block
    of keys after the other, those that it sees in part first; ``safe``: without a check for rows that have seen none
    so far."""
    length, size = q.shape[2], 128
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = torch.empty_like(q)
    for row in range(len(q)):
        for i in range(-(-length // size)):
            queries = torch.arange(size * i, min(size * (i + 1), length))
            top = torch.full((q.shape[1], len(queries)), -torch.inf)
            total, acc = torch.zeros_like(top), torch.zeros(*top.shape, q.shape[3])
            at = row % len(mask.kv_indices), 0, i
            partly = mask.kv_indices[at][: int(mask.kv_num_blocks[at])].tolist()
            wholly = mask.full_kv_indices[at][: int(mask.full_kv_num_blocks[at])].tolist()
            for j in (*partly, *wholly):
                keys = torch.arange(size * j, min(size * (j + 1), length))
                logits = scale * q[row][:, queries] @ k[row][:, keys].transpose(-2, -1)
                if j in partly:
                    logits = torch.where(mask.mask_mod(row, 0, queries[:, None], keys), logits, -torch.inf)
                raised = torch.maximum(top, logits.amax(-1))
                base = raised if safe else raised.masked_fill(raised == -torch.inf, 0.0)
                alpha, p = (top - base).exp(), (logits - base[..., None]).exp()
                total, acc = total * alpha + p.sum(-1), acc * alpha[..., None] + p @ v[row][:, keys]
                top = raised
            out[row][:, queries] = acc / total[..., None]
    return out


@pytest.mark.parametrize("length", [11, 200, 400, 512])
def test_flex_s_kernel_checks_rows_that_begin_behind_the_first_keys_of_their_block(length: int) -> None:
    """Beside queries of an earlier document, a later one's are handed keys of which they see none."""
    starts, (q, k, v) = spread(length), drawn(length)
    alone = torch.zeros_like(starts)
    for mask, begin, options in (
        (SEEN["flex"](starts, CPU), starts, flex.AMONG_DOCUMENTS),
        (flex.causal_mask(length, "cpu"), alone, flex.CAUSAL),
    ):
        found = by_tiles(q, k, v, 0.25, mask, options.get("ROWS_GUARANTEED_SAFE", False))
        wanted = BACKENDS["math"](q, k, v, Scores(0.25), 0.0, SEEN["math"](begin, CPU))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_sdpa_equals_math() -> None:
    starts, tensors = spread(200), drawn(200)
    found, wanted = (BACKENDS[name](*tensors, Scores(0.25), 0.0, SEEN[name](starts, CPU)) for name in ("sdpa", "math"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_flash_s_ends_are_those_of_the_documents_and_of_few_lengths() -> None:
    ends = SEEN["flash"](STARTS, CPU)
    assert ends.dtype == torch.int32
    assert ends.tolist() == [0, 4, 11, 13, 14, 21, 22, 33]
    assert SEEN["flash"](torch.zeros(1, 5, dtype=torch.int64), CPU).tolist() == [0, 5]
    longer = SEEN["flash"](spread(400), CPU)
    assert len(longer) == 16 and (longer.diff() >= 0).all() and longer[-4:].tolist() == [800] * 4


@pytest.mark.parametrize(
    ("fields", "cpu", "cuda"),
    [
        ({"recipe": "qk_norm"}, "sdpa", "flex"),
        ({"recipe": "qk_norm_cap"}, "math", "flex"),
        ({"recipe": "soft_clip"}, "math", "math"),
        ({"attention_dropout": 0.1}, "sdpa", "sdpa"),
        ({"attention": "sdpa"}, "sdpa", "sdpa"),
    ],
)
def test_choice_of_backend(fields: dict[str, Any], cpu: str, cuda: str) -> None:
    cfg = ModelConfig(**fields)
    found = [choose_backend(cfg, device, documents=True) for device in ("cpu", "cuda")]
    assert [choice.name for choice in found] == [cpu, cuda]
    assert all(len(choice.reason.split()) > 3 for choice in found)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_probes_look_at_what_is_seen(stride: int) -> None:
    """Largest logits and entropies, of each document by itself."""
    q, k, _ = drawn(11, 8)
    starts, scores = STARTS[:2], Scores(0.5, cap=3.0)
    top, entropy = attention_statistics(q, k, scores, stride, starts)
    wanted_top, wanted = torch.full((4,), -torch.inf), torch.zeros(4)
    for row, at in ((row, at) for row in range(2) for at in range(stride - 1, 11, stride)):
        first = int(starts[row, at])
        for head in range(4):
            logits = 0.5 * (k[row, head // 2, first : at + 1] @ q[row, head, at])
            wanted_top[head] = max(wanted_top[head], logits.max())
            p = (3 * torch.tanh(logits / 3)).softmax(0)
            wanted[head] -= (p * p.log()).sum()
    torch.testing.assert_close(top, wanted_top)
    torch.testing.assert_close(entropy, wanted)


def test_qk_clip_s_largest_logits_are_of_what_is_seen() -> None:
    cfg = config(recipe="baseline", layers=1)
    model = Transformer(layer_list(cfg, ALONE, seed=0, documents=True))
    peaks = Peaks(model, 4, CPU)
    masked(model, cfg).announce(ROWS)
    caught: list[tuple[Tensor, Tensor]] = []
    attention = next(module for module in model.modules() if isinstance(module, Attention))
    project = attention.project

    def seen(*given: Any) -> Any:
        q, k, v = project(*given)
        caught.append((q.transpose(1, 2), k.transpose(1, 2)))
        return q, k, v

    attention.project = seen  # type: ignore[method-assign]
    model(ROWS)
    ((q, k),) = caught
    logits = attention.scores.scale * q @ k.transpose(-2, -1)
    wanted = logits.masked_fill(~visible(STARTS, CPU), -torch.inf).amax((0, 2, 3))
    torch.testing.assert_close(peaks.rows[0], wanted)
    assert (wanted < logits.masked_fill(~torch.ones(11, 11).tril().bool(), -torch.inf).amax((0, 2, 3))).any()


def test_probes_are_told_where_documents_begin() -> None:
    cfg, told = config(recipe="baseline", layers=1), []

    class Told(Unprobed):
        def attention(self, q: Tensor, k: Tensor, scores: Scores, starts: Tensor | None = None) -> None:
            told.append(starts)

    model = Transformer(layer_list(cfg, ALONE, seed=0, documents=True))
    model.layers["blocks_0"].measure(Told())
    model(ROWS)
    masked(model, cfg).announce(ROWS)
    model(ROWS)
    assert told[0] is None and torch.equal(told[1], STARTS)
