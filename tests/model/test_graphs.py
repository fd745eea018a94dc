"""A compiled block is one graph, without a break, and all blocks of a model share it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from packaging.version import Version

from megatron_stable.training.compilation import GRAPHS
from tests.harness.ranks import Ranks

BLOCKS = 3


def graphs(
    model: dict[str, Any], tensor: int, sequence: bool, peaks: bool = False, documents: bool = False
) -> dict[str, Any]:
    """Train and evaluate a compiled model on one rank: how many graphs that makes, and what breaks them.

    Args:
        peaks: Whether the largest attention logits are recorded.
        documents: Whether rows hold several, others in each pass.
    """
    import torch
    import torch.distributed as dist
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch._dynamo.utils import counters

    from megatron_stable.config.schema import Config
    from megatron_stable.model.documents import DocumentMask
    from megatron_stable.model.peaks import Peaks
    from megatron_stable.model.transformer import Transformer, layer_list
    from megatron_stable.parallel.topology import TensorParallel

    shape = {"size": None, "layers": BLOCKS, "hidden": 32, "heads": 4, "sequence_length": 16, "vocab_size": 64}
    config = Config.model_validate({"model": {**shape, **model}}).model
    tp = TensorParallel(dist.group.WORLD, 0, tensor, sequence) if tensor > 1 else TensorParallel()
    net, counter = Transformer(layer_list(config, tp, seed=0)), CompileCounterWithBackend("aot_eager")
    for i in range(BLOCKS):
        net.layers[f"blocks_{i}"].compile(backend=counter, dynamic=False)
    recorded = Peaks(net, config.heads // tensor, torch.device("cpu")).rows if peaks else None
    mask = DocumentMask(net, config, 0, torch.device("cpu")) if documents else None

    def logits(seed: int) -> torch.Tensor:
        tokens = torch.randint(8, (2, 16), generator=torch.Generator().manual_seed(seed))
        if mask is not None:
            mask.announce(tokens)
        found: torch.Tensor = net(tokens)
        return found

    for seed in range(3):
        logits(seed).float().sum().backward()
    trained = counter.frame_count
    assert recorded is None or recorded.isfinite().all()
    with torch.no_grad():
        logits(3)
    operators = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert not any("cos" in operator for operator in operators), "the rotary table is a constant of the graph"
    return {"trained": trained, "evaluated": counter.frame_count - trained, "breaks": dict(counters["graph_break"])}


takes_collectives = pytest.mark.skipif(Version(torch.__version__) < GRAPHS, reason=f"needs PyTorch {GRAPHS}")


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(
    ("tensor", "sequence"),
    [
        pytest.param(1, False, id="alone"),
        pytest.param(2, False, id="tp", marks=takes_collectives),
        pytest.param(2, True, id="sp", marks=takes_collectives),
    ],
)
def test_all_blocks_are_one_graph(ranks: Ranks, tensor: int, sequence: bool, recompute: str) -> None:
    model = {"recipe": "qk_norm_cap", "activation_checkpointing": recompute}
    (found,) = ranks.run(tensor, graphs, model, tensor, sequence, only=[0], timeout=120)
    assert found["breaks"] == Counter()
    # a block that recomputes runs without gradients, too, and then with them
    assert (found["trained"], found["evaluated"]) == (2 if recompute == "full" else 1, 1)


@takes_collectives
@pytest.mark.parametrize(
    "model",
    [
        {"recipe": "sigma_reparam", "activation": "swiglu"},
        {"recipe": "olmo2", "layer_scale": 0.3, "kv_heads": 2},
        {"recipe": "deepnorm", "bias": True},
    ],
    ids=["sigma_reparam", "olmo2", "deepnorm"],
)
def test_recipes_are_one_graph(ranks: Ranks, model: dict[str, Any]) -> None:
    (found,) = ranks.run(2, graphs, model, 2, True, only=[0], timeout=120)
    assert found == {"trained": 1, "evaluated": 1, "breaks": {}}


@takes_collectives
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_largest_logits_are_a_part_of_the_graph(ranks: Ranks, recompute: str) -> None:
    model = {"recipe": "soft_temp", "activation_checkpointing": recompute}
    (found,) = ranks.run(2, graphs, model, 2, True, True, only=[0], timeout=120)
    assert found == {"trained": 2 if recompute == "full" else 1, "evaluated": 1, "breaks": {}}


@takes_collectives
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("recipe", ["qk_norm_cap", "soft_temp"], ids=["math", "sdpa"])
def test_documents_are_a_part_of_the_graph(ranks: Ranks, recipe: str, recompute: str) -> None:
    model = {"recipe": recipe, "activation_checkpointing": recompute}
    (found,) = ranks.run(2, graphs, model, 2, True, recipe == "soft_temp", True, only=[0], timeout=120)
    assert found == {"trained": 2 if recompute == "full" else 1, "evaluated": 1, "breaks": {}}


def flex_graphs(recipe: str, documents: bool) -> dict[str, Any]:
    """The same of blocks with FlexAttention, without gradients, which it has on CUDA alone; and how far from plain."""
    import torch
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch._dynamo.utils import counters

    from megatron_stable.config.parametrization import ModelMultipliers
    from megatron_stable.config.schema import Config
    from megatron_stable.model.backends import SEEN
    from megatron_stable.model.block import Block
    from megatron_stable.model.documents import DocumentMask, document_starts
    from megatron_stable.parallel.topology import TensorParallel

    model = {"size": None, "hidden": 32, "heads": 4, "kv_heads": 2, "vocab_size": 64, "recipe": recipe}
    config = Config.model_validate({"model": model}).model
    counter, x, apart, cpu = CompileCounterWithBackend("aot_eager"), torch.randn(2, 128, 32), 0.0, torch.device("cpu")
    with torch.no_grad():
        for _ in range(BLOCKS):
            plain, flex = (
                Block(config, TensorParallel(), backend, False, ModelMultipliers(config.head_dim**-0.5))
                for backend in ("math", "flex")
            )
            for here, there in zip(plain.parameters(), flex.parameters(), strict=True):
                there.copy_(here.normal_(std=0.1))
            flex.compile(backend=counter, dynamic=False)
            if documents:
                starts = document_starts(torch.randint(20, (2, 128)), 0)
                for block, backend in ((plain, "math"), (flex, "flex")):
                    mask = DocumentMask(block, config, 0, cpu)
                    mask.see = SEEN[backend]
                    block.documents = mask.documents(starts)
            apart = max(apart, float((flex(x) - plain(x)).abs().max()))
    return {"graphs": counter.frame_count, "breaks": dict(counters["graph_break"]), "apart": apart}


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("recipe", ["soft_cap", "qk_norm"])
def test_flex_attention_is_a_part_of_the_graph(ranks: Ranks, recipe: str, documents: bool) -> None:
    (found,) = ranks.run(1, flex_graphs, recipe, documents, only=[0], timeout=120)
    assert (found["graphs"], found["breaks"]) == (1, {})
    assert found["apart"] < 1e-5
