"""Gradients are summed over replicas in fp32, whatever the model's dtype and whoever does the sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_stable.config.schema import Config
from tests.engine.layouts import (
    GLOBAL,
    assemble,
    engine_on_rank,
    global_batches,
    make_config,
    micro_batches,
    train_on_ranks,
)
from tests.harness.ranks import Ranks

EXACT = 2e-6
# (replicas, ZeRO stage, PP)
LAYOUTS = [
    (1, 2, 1), (1, 3, 1),
    (2, 1, 1), (2, 2, 1), (2, 3, 1), (2, 1, 2),
    (4, 1, 1), (4, 2, 1), (4, 3, 1), (4, 1, 2),
    (8, 1, 1), (8, 2, 1), (8, 3, 1),
]  # fmt: skip
QUICK = [(1, 3, 1), (2, 1, 1), (2, 3, 1), (2, 1, 2), (4, 2, 1), (4, 1, 2), (8, 1, 1)]
CASES = [pytest.param(*each, marks=[] if each in QUICK else pytest.mark.full) for each in LAYOUTS]


def bf16(zero_stage: int, pipeline: int = 1, **precision: Any) -> Config:
    # an update of Adam with a large eps is proportional to the gradient, and clipping would hide its scale
    optimizer = {"eps": 1.0, "clip_grad": 0.0, "weight_decay": 0.0, "learning_rate": 1.0}
    parallel = {"zero_stage": zero_stage, "pipeline": pipeline}
    return make_config(optimizer=optimizer, parallel=parallel, precision={"dtype": "bf16", **precision})


def first_step(ranks: Ranks, world: int, config: Config) -> tuple[float, dict[str, Tensor]]:
    """Gradient norm and weights after one step."""
    results = ranks.run(world, train_on_ranks, config.model_dump(mode="json"), 1)
    return results[0]["metrics"][0]["grad_norm"], assemble(results)


@pytest.fixture(scope="module")
def alone(ranks: Ranks) -> tuple[float, dict[str, Tensor]]:
    return first_step(ranks, 1, bf16(1))


def off(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of a weight, relative to the largest of its tensor."""
    return max(float((found[n] - w).abs().max() / w.abs().max()) for n, w in expected.items() if w.any())


@pytest.mark.parametrize("replicas, zero_stage, pipeline", CASES)
def test_the_same_micro_batches_make_the_same_step(
    ranks: Ranks, alone: tuple[float, dict[str, Tensor]], replicas: int, zero_stage: int, pipeline: int
) -> None:
    norm, weights = first_step(ranks, replicas * pipeline, bf16(zero_stage, pipeline))
    assert norm == pytest.approx(alone[0], rel=EXACT)
    assert off(weights, alone[1]) < EXACT


def train_with_small_buckets(values: dict[str, Any], steps: int) -> dict[str, Any]:
    """On a rank: as :func:`train_on_ranks`, with matrices that are larger than DeepSpeed's buffer for reduction."""
    from megatron_stable.engine import deepspeed_config

    deepspeed_config.BUCKET = 500
    return train_on_ranks(values, steps)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_matrices_larger_than_a_bucket(ranks: Ranks, alone: tuple[float, dict[str, Tensor]], zero_stage: int) -> None:
    results = ranks.run(2, train_with_small_buckets, bf16(zero_stage).model_dump(mode="json"), 1)
    assert results[0]["metrics"][0]["grad_norm"] == pytest.approx(alone[0], rel=EXACT)
    assert off(assemble(results), alone[1]) < EXACT


def test_sums_in_16_bits_are_rounded(ranks: Ranks, alone: tuple[float, dict[str, Tensor]]) -> None:
    """What the option costs: the figures of docs/configuration.md, and that the test above could see it."""
    for zero_stage in (1, 2):
        norm, weights = first_step(ranks, 4, bf16(zero_stage, reduce_dtype="bf16"))
        print(f"ZeRO-{zero_stage}: norm {abs(norm / alone[0] - 1):.1e}, weights {off(weights, alone[1]):.1e}")
        assert EXACT < off(weights, alone[1]) < 1e-2


def bytes_on_rank(values: dict[str, Any]) -> dict[str, int]:
    """On a rank: elements that the collectives over several ranks take in one step, by their name."""
    sent: dict[str, int] = {}

    def counted(name: str) -> Any:
        call = getattr(torch.distributed, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            given = args[1] if name == "reduce_scatter_tensor" else args[0]
            if given.numel() > 1000:
                sent[name] = sent.get(name, 0) + given.numel() * given.element_size()
            return call(*args, **kwargs)

        return count

    for name in ("all_reduce", "reduce_scatter_tensor"):
        setattr(torch.distributed, name, counted(name))
    with engine_on_rank(values) as engine:
        engine.train_step(1, micro_batches(global_batches(1)[0], engine.config, engine.topology), 1e-3)
        sent["parameters"] = sum(weight.numel() for weight in engine.module.parameters())
    return sent


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_each_replica_receives_its_own_part_only(ranks: Ranks, dtype: str) -> None:
    for sent in ranks.run(2, bytes_on_rank, bf16(1, dtype=dtype).model_dump(mode="json")):
        assert "all_reduce" not in sent
        assert sent["reduce_scatter_tensor"] == pytest.approx(4 * sent["parameters"], rel=0.01)


class Copies(TorchDispatchMode):
    """Counts the elements of copies of tensors of certain sizes."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes, self.count = sizes, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function._schema.name in ("aten::copy_", "aten::_to_copy", "aten::clone", "aten::cat"):
            self.count += out.numel() if out.numel() in self.sizes else 0
        return out


def copied_on_rank(values: dict[str, Any]) -> tuple[int, int, bool]:
    """On a rank: elements of gradients and weights that a step copies; how many elements the matrices have; whether
    masters and weights are the same memory."""
    with engine_on_rank(values) as engine:
        weights = list(engine.module.parameters())
        masters = [state.shard.flat for state in engine.shards()]
        matrices = [weight.numel() for weight in weights if weight.dim() > 1]
        with Copies({*matrices, *(master.numel() for master in masters)}) as copies:
            engine.train_step(1, micro_batches(global_batches(1)[0], engine.config, engine.topology), 1e-3)
        own = {weight.untyped_storage().data_ptr() for weight in weights}
        return copies.count, sum(matrices), {master.untyped_storage().data_ptr() for master in masters} <= own


def test_in_fp32_gradients_are_copied_once_and_weights_never(ranks: Ranks) -> None:
    ((copied, elements, shared),) = ranks.run(1, copied_on_rank, bf16(1, dtype="fp32").model_dump(mode="json"))
    assert copied == elements
    assert shared


def poisoned_on_rank(values: dict[str, Any], rank: int) -> tuple[bool, bool]:
    """On a rank: whether the step was dropped, and the weights stayed, where one rank's copy of a gradient is NaN."""
    from megatron_stable.parallel.parameters import place

    with engine_on_rank(values) as engine:
        norm = next(w for w in engine.module.parameters() if place(w).name == "final_norm.weight")
        if torch.distributed.get_rank() == rank:
            norm.register_hook(lambda grad: torch.full_like(grad, torch.nan))
        before = [state.tensors["weight"].clone() for state in engine.shards()]
        batches = micro_batches(global_batches(1)[0], engine.config, engine.topology)
        skipped = engine.train_step(1, batches, 1e-3).metrics.skipped
        after = [state.tensors["weight"] for state in engine.shards()]
    return skipped, all(map(torch.equal, before, after))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_in_a_replicated_gradient_is_seen_on_any_rank(ranks: Ranks, rank: int) -> None:
    config = make_config(parallel={"tensor": 2}, precision={"dtype": "bf16"})
    assert ranks.run(2, poisoned_on_rank, config.model_dump(mode="json"), rank) == [(True, True)] * 2


def embedding_on_rank(values: dict[str, Any]) -> list[Tensor]:
    """On a rank: its copy of the embedding's weights after some steps, if its stage has one."""
    from megatron_stable.parallel.parameters import place

    with engine_on_rank(values) as engine:
        for step, tokens in enumerate(global_batches(4), start=1):
            engine.train_step(step, micro_batches(tokens, engine.config, engine.topology), 1e-3)
        named = {place(weight).name: weight.detach().clone() for weight in engine.module.parameters()}
    return [weight for name, weight in named.items() if name == "embedding.weight"]


@pytest.mark.parametrize("reduce_dtype", ["fp32", "bf16"])
def test_stages_keep_equal_copies_of_tied_embeddings(ranks: Ranks, reduce_dtype: str) -> None:
    """Sums of four replicas depend on their order, which depends on where in its flat a gradient lies."""
    config = make_config(
        model={"tied_embeddings": True, "positions": "learned"},
        parallel={"pipeline": 2},
        precision={"dtype": "bf16", "reduce_dtype": reduce_dtype},
    )
    found = ranks.run(8, embedding_on_rank, config.model_dump(mode="json"))
    first, *others = [copy for copies in found for copy in copies]
    assert len(others) == 7
    assert all(torch.equal(first, copy) for copy in others)


def sums_on_rank(values: dict[str, Any]) -> tuple[list[str], list[list[float]]]:
    """On a rank: what writes to the sums of gradients in a step, and its gradient of a norm after each of three steps,
    of which the second does not reach it."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from megatron_stable.engine.outcome import Refused
    from megatron_stable.parallel.parameters import place

    with engine_on_rank(values) as engine:
        norm = next(w for w in engine.module.parameters() if place(w).name == "final_norm.weight")
        (norm_sum,) = [
            total
            for group, totals in zip(
                engine.deepspeed.optimizer.bf16_groups, engine.deepspeed.optimizer.fp32_groups_gradients, strict=True
            )
            for weight, total in zip(group, totals, strict=True)
            if weight is norm
        ]
        ours = {flat.untyped_storage().data_ptr() for flat in engine.deepspeed.optimizer.fp32_groups_gradients_flat}

        class Writes(TorchDispatchMode):
            def __init__(self) -> None:
                super().__init__()
                self.names: list[str] = []

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                for argument, value in zip(func._schema.arguments, args, strict=False):
                    if argument.alias_info is not None and argument.alias_info.is_write:
                        tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
                        self.names += [func._schema.name] * any(t.untyped_storage().data_ptr() in ours for t in tensors)
                return func(*args, **(kwargs or {}))

        found: list[list[float]] = []

        def approve(metrics: Any) -> Refused:
            found.append(norm_sum.flatten().tolist())
            return Refused(True)

        batches = micro_batches(global_batches(1)[0], engine.config, engine.topology)
        for step in (1, 2, 3):
            norm.requires_grad_(step != 2)
            with Writes() as writes:
                engine.train_step(step, batches, 0.0, approve)
    return writes.names, found


def test_the_first_micro_batch_begins_the_sums(ranks: Ranks) -> None:
    """Nobody zeroes them, and nothing of the step before is left, not even where no gradient comes."""
    ((writes, found),) = ranks.run(1, sums_on_rank, bf16(1).model_dump(mode="json"))
    assert set(writes) <= {"aten::copy_", "aten::add_", "aten::_fused_adamw_"} and "aten::add_" in writes
    parameters = writes.count("aten::copy_")
    assert writes.count("aten::add_") == parameters * (GLOBAL - 1)
    assert any(found[0]) and found[2] == found[0]
    assert not any(found[1])


def passes_on_rank(values: dict[str, Any]) -> int:
    """On a rank: how often a step multiplies all that one of its flats has of the gradient."""
    from torch.utils._python_dispatch import TorchDispatchMode

    with engine_on_rank(values) as engine:
        sizes = {flat.numel() for flat in engine.deepspeed.optimizer.fp32_partitioned_groups_flat}
        found: list[int] = []

        class Multiplied(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                found.extend([1] * (func._schema.name == "aten::mul_" and args[0].numel() in sizes))
                return func(*args, **(kwargs or {}))

        with Multiplied():
            engine.train_step(1, micro_batches(global_batches(1)[0], engine.config, engine.topology), 1e-3)
    return len(found)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_zero_3_divides_by_a_loss_scale_where_there_is_one(ranks: Ranks, dtype: str) -> None:
    precision = {"dtype": dtype, "initial_scale_power": 8}
    config = make_config(parallel={"zero_stage": 3}, precision=precision)
    (found,) = ranks.run(1, passes_on_rank, config.model_dump(mode="json"))
    assert (found > 0) == (dtype == "fp16")
