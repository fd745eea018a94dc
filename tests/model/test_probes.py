"""Probes do not break compiled blocks, and a layer that is not measured is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from megatron_stable.model.activations import Activations
from megatron_stable.model.block import Block
from megatron_stable.model.probes import LOWEST, magnitudes
from megatron_stable.model.transformer import Transformer, layer_list
from megatron_stable.parallel.topology import TensorParallel
from tests.engine.layouts import global_batches, make_config

TOKENS = global_batches(1)[0][:, :-1]


def model_and_probes(model: dict[str, Any], **logging: Any) -> tuple[Transformer, Activations]:
    config = make_config({"attention": "sdpa", **model}, logging={"probe_positions": 4, **logging})
    network = Transformer(layer_list(config.model, TensorParallel(), seed=1))
    return network, Activations(network, config.model, config.logging, TensorParallel(), torch.device("cpu"))


def step(network: Transformer, probes: Activations, on: bool) -> torch.Tensor:
    probes.begin(on)
    network(TOKENS).square().mean().backward()
    return torch.cat([probes.sums, probes.tops], 1).clone()


@pytest.mark.parametrize(
    "model", [{}, {"activation": "swiglu", "kv_heads": 2, "recipe": "olmo2"}], ids=["plain", "olmo2"]
)
def test_compiled_blocks_are_one_graph_each_with_probes_and_without(model: dict[str, Any]) -> None:
    torch._dynamo.reset()
    network, probes = model_and_probes(model)
    plain = step(network, probes, on=True)
    graphs = CompileCounterWithBackend("aot_eager")
    for block in network.modules():
        if isinstance(block, Block):
            block.compile(backend=graphs, fullgraph=True, dynamic=False)
    compiled = step(network, probes, on=True)
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)
    assert graphs.frame_count == 1, "all blocks share one graph"
    for on in (False, True, False):
        step(network, probes, on)
    assert graphs.frame_count == 2, "one graph with probes, one without, and no new one at each change"


def test_what_is_recomputed_counts_once() -> None:
    found = [step(*model_and_probes({"activation_checkpointing": how}), on=True) for how in ("none", "full", 2)]
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_groups_are_measured_each_by_itself() -> None:
    network, probes = model_and_probes({}, probes=("attention",))
    assert not step(network, probes, on=True)[:, :7].any() and probes.sums[:, 7:].gt(0).all()
    network, probes = model_and_probes({}, probes=("outputs",))
    assert not step(network, probes, on=True)[:, 7:11].any() and probes.sums[:, :7].gt(0).all()


def test_evaluation_is_not_measured() -> None:
    network, probes = model_and_probes({})
    probes.begin(True)
    with torch.no_grad():
        network(TOKENS)
    assert not probes.sums.any() and probes.tops.eq(-torch.inf).all()


def test_values_that_are_no_numbers_are_seen() -> None:
    network, probes = model_and_probes({})
    next(block for block in network.modules() if isinstance(block, Block)).mlp.fc1.weight.data[0, 0] = torch.nan
    step(network, probes, on=True)
    assert probes.tops[0, 4].isnan() and probes.sums[0, 4].isnan() and probes.tops[0, 0].isfinite()


def test_histograms_count_magnitudes_by_powers_of_two() -> None:
    x = torch.tensor([0.0, 2.0**-40, 0.75, -1.0, 1.99, 2.0, -3.0, 2.0**40, torch.inf, torch.nan])
    counts = magnitudes(x)
    assert counts.sum() == 9, "all but the NaN"
    assert {LOWEST + i: int(n) for i, n in enumerate(counts) if n} == {-32: 2, -1: 1, 0: 2, 1: 2, 31: 2}


def test_histograms_are_of_all_outputs() -> None:
    network, probes = model_and_probes({}, histograms_every=1)
    probes.begin(False, histograms=True)
    network(TOKENS).square().mean().backward()
    assert probes.counts is not None and not probes.sums.any()
    widths = torch.tensor([32, 32, 32, 32, 128, 32, 32], dtype=torch.float64)
    assert torch.equal(probes.counts.sum(-1), (TOKENS.numel() * widths).expand(4, 7))
    probes.begin(True)
    network(TOKENS).square().mean().backward()
    assert torch.equal(probes.counts.sum(-1), (TOKENS.numel() * widths).expand(4, 7)), "not of each measured step"
