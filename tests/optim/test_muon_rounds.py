"""Muon gathers its matrices in rounds, and iterates those of a round together: bounded, and without a trace."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_stable.optim import muon
from megatron_stable.parallel.shards import Place
from tests.engine.layouts import assemble, make_config, train_on_ranks
from tests.harness.ranks import Ranks


@given(st.lists(st.integers(1, 3 * muon.ROUND // 2), max_size=30), st.integers(1, 9))
def test_no_rank_holds_more_than_a_round(sizes: list[int], ranks: int) -> None:
    places = [Place((1, size), name=str(n)) for n, size in enumerate(sizes)]
    rounds = muon._rounds(places, ranks)
    assert sorted(name for owner in rounds for name in owner) == sorted(place.name for place in places)
    for owner in rounds:
        for rank in range(ranks):
            own = [sizes[int(name)] for name in owner if owner[name] == rank]
            assert sum(own) <= muon.ROUND or len(own) == 1
    for before in rounds[:-1]:
        assert len(set(before.values())) == min(ranks, len(before)), (
            "a rank has nothing to do, and another round follows"
        )


def train_in_rounds(values: dict[str, Any], elements: int) -> dict[str, Any]:
    """On a rank: two steps with rounds of so many elements."""
    muon.ROUND = elements
    return train_on_ranks(values, 2)


def test_rounds_leave_no_trace(ranks: Ranks) -> None:
    config = make_config(parallel={"tensor": 2}, optimizer={"name": "muon"}).model_dump(mode="json")
    whole, one_by_one = (assemble(ranks.run(2, train_in_rounds, config, elements)) for elements in (2**25, 1))
    for name, weight in whole.items():  # up to the last bits, which may depend on how many are multiplied at once
        torch.testing.assert_close(one_by_one[name], weight, rtol=1e-6, atol=1e-6)


def test_maps_of_one_shape_are_iterated_together() -> None:
    """Queries, keys, values and the projection of all blocks; gate, up and, transposed, down."""
    model = make_config({"activation": "swiglu"}).model
    shapes = {"attention.qkv": (96, 32), "attention.proj": (32, 32), "mlp.fc1": (2, 48, 32), "mlp.fc2": (32, 48)}
    generator = torch.Generator().manual_seed(0)
    wholes = {
        f"blocks.{n}.{name}.weight": torch.randn(s, generator=generator) for n in range(3) for name, s in shapes.items()
    }
    alone = {name: whole.clone() for name, whole in wholes.items()}
    products: list[int] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            products.extend([len(args[0])] * (func is torch.ops.aten.baddbmm.default))
            return func(*args, **(kwargs or {}))

    with Products():
        muon.orthogonalize_(wholes, model, torch.float32)
    assert products == [3 * 4] * 2 * muon.ITERATIONS + [3 * 3] * 2 * muon.ITERATIONS
    for name, whole in alone.items():
        muon.orthogonalize_({name: whole}, model, torch.float32)
        torch.testing.assert_close(wholes[name], whole, rtol=1e-3, atol=1e-5)
