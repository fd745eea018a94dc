"""Logits with a cache against the plain reference over the whole sequence, for every recipe and knob."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_stable.config.schema import ModelConfig
from megatron_stable.model.cache import Cache, remembering
from megatron_stable.model.transformer import Transformer
from tests.model.test_recipes import CASES, TWO, VOCAB, config, filled
from tests.reference import model as reference

LENGTH = 11
PLACES: dict[str, dict[str, Any]] = {
    "rope": {"positions": "rope"},
    "learned": {"positions": "learned"},
    "none": {"positions": "none"},
}


def drawn(rows: int) -> Tensor:
    return torch.randint(VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(2))


def padded(tokens: Tensor, lengths: list[int], cache: Cache, model: Transformer) -> list[Tensor]:
    """Logits of the first tokens of each row, in one pass: ``[length, v]`` each."""
    inputs = tokens[:, : max(lengths)].clone()
    for row, length in enumerate(lengths):
        inputs[row, length:] = 0
    cache.at(range(len(tokens)), [0] * len(tokens), max(lengths))
    return [row[:length] for row, length in zip(model(inputs), lengths, strict=True)]


@torch.no_grad()
def cached(model: Transformer, cfg: ModelConfig, tokens: Tensor, lengths: list[int]) -> list[Tensor]:
    """Logits of each row: of a prompt of these lengths at once, then token by token; rows that are done are let go."""
    with remembering(model, cfg, len(tokens), LENGTH) as cache:
        found = padded(tokens, lengths, cache, model)
        at, rows = dict(enumerate(lengths)), list(range(len(lengths)))
        while at:
            if len(at) < len(rows):
                cache.keep([place for place, row in enumerate(rows) if row in at])
            rows = list(at)
            cache.at(range(len(rows)), list(at.values()), 1)
            logits = model(torch.stack([tokens[row, place : place + 1] for row, place in at.items()]))
            for one, row in zip(logits, rows, strict=True):
                found[row] = torch.cat((found[row], one))
            at = {row: place + 1 for row, place in at.items() if place + 1 < LENGTH - (row == 1)}
    return found


def capped(logits: Tensor, cfg: ModelConfig) -> Tensor:
    """As `forward` of the reference gives them; the model leaves the last cap to the loss."""
    cap = cfg.final_logit_cap
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [*CASES, "tied_gqa_bias"])
def test_logits_equal_the_reference(name: str, place: str) -> None:
    fields = {"tied_embeddings": True, **TWO} if name == "tied_gqa_bias" else CASES[name]
    cfg = config(**{**PLACES[place], **fields})
    parameters = reference.draw_parameters(cfg, VOCAB, seed=5)
    model, tokens = filled(cfg, parameters).eval(), drawn(3)
    wanted = reference.forward(parameters, tokens, cfg)
    even, uneven = [4, 4, 4], [4, 1, 7]
    # the rotary table is fp32
    for dtype, lengths, bound in (
        (torch.float64, uneven, 1e-6),
        (torch.float64, even, 1e-6),
        (torch.float32, uneven, 1e-5),
    ):
        found = cached(model.to(dtype), cfg, tokens, lengths)
        for row, logits in enumerate(found):
            assert len(logits) == LENGTH - (row == 1)
            one = capped(logits[:, :VOCAB].double(), cfg)
            torch.testing.assert_close(one, wanted[row, : len(one)], rtol=bound, atol=bound * float(wanted.abs().max()))


@torch.no_grad()
def test_a_sequence_that_begins_anew_sees_nothing_of_before() -> None:
    cfg = config(positions="rope", attention_cap=0.7)
    parameters = reference.draw_parameters(cfg, VOCAB, seed=5)
    model, tokens = filled(cfg, parameters).eval(), drawn(3)
    with remembering(model, cfg, 3, LENGTH) as cache:
        padded(tokens, [5, 9, 3], cache, model)
        cache.at([1], [0], 4)  # of the second alone
        again = model(tokens[1:2, 5:9])
        cache.at(range(3), [5, 4, 3], 1)
        going = model(torch.stack((tokens[0, 5:6], tokens[1, 9:10], tokens[2, 3:4])))
    shifted = reference.forward(parameters, tokens[1:2, 5:10], cfg)
    torch.testing.assert_close(again[..., :VOCAB], shifted[:, :4], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(going[1, :, :VOCAB], shifted[0, 4:], rtol=1e-6, atol=1e-6)
    for row, place in ((0, 5), (2, 3)):
        wanted = reference.forward(parameters, tokens[row : row + 1, : place + 1], cfg)[0, -1:]
        torch.testing.assert_close(going[row, :, :VOCAB], wanted, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_the_model_is_as_before_afterwards() -> None:
    cfg = config(positions="learned")
    model, tokens = filled(cfg, reference.draw_parameters(cfg, VOCAB, seed=5)).eval(), drawn(2)
    before = model(tokens)
    with remembering(model, cfg, 2, LENGTH) as cache:
        padded(tokens, [3, 5], cache, model)
    assert torch.equal(model(tokens), before)
