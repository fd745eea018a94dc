"""The largest logits that attention records, against all s x s of them by the plain model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_stable.model.peaks import Peaks
from megatron_stable.model.transformer import Transformer, layer_list
from megatron_stable.parallel.parameters import place
from megatron_stable.parallel.topology import TensorParallel
from tests.engine.layouts import VOCAB, global_batches, make_config
from tests.optim.formulas import largest_logits

TOKENS = [tokens[:, :-1] for tokens in global_batches(2)]


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"kv_heads": 2, "bias": True, "positions": "learned", "attention_temperature": 0.5},
        {"recipe": "soft_cap", "attention_cap": 0.1, "activation_checkpointing": "full"},
    ],
    ids=["rope", "gqa_learned", "capped_recomputed"],
)
def test_peaks_are_those_of_all_logits_of_all_passes(model: dict[str, Any]) -> None:
    config = make_config({"layers": 2, "dropout": 0.0, **model})
    network = Transformer(layer_list(config.model, TensorParallel(), seed=1)).double()
    for weight in network.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    peaks = Peaks(network, 4, torch.device("cpu"))
    plain = {
        place(w).name: w.detach()[:VOCAB] if "embedding" in place(w).name else w.detach() for w in network.parameters()
    }
    plain["head.weight"] = plain["head.weight"][:VOCAB]
    each = [largest_logits(plain, tokens, config) for tokens in TOKENS]

    def recorded() -> dict[str, torch.Tensor]:
        return {f"{block}.attention": row.clone() for block, row in zip(peaks.blocks, peaks.rows, strict=True)}

    for tokens in TOKENS:
        network(tokens).square().mean().backward()
    expected = {name: torch.maximum(each[0][name], each[1][name]).float() for name in each[0]}
    torch.testing.assert_close(recorded(), expected)
    assert any(not torch.equal(each[0][name], each[1][name]) for name in expected), "both passes count"
    peaks.reset()
    network.eval()
    with torch.no_grad():
        network(TOKENS[0])
    assert all(row.eq(-torch.inf).all() for row in peaks.rows), "evaluation is not a step"
    network.train()
    network(TOKENS[1])
    torch.testing.assert_close(recorded(), {name: value.float() for name, value in each[1].items()})
