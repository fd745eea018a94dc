"""1F1B of our own beside DeepSpeed's: the same bits, fewer bytes held, and nobody waited for who need not be."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_stable.engine.schedule import one_forward_one_backward
from tests.engine.layouts import engine_on_rank, global_batches, make_config, micro_batches
from tests.harness.ranks import Ranks

STEPS = 3
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "pp2": (2, {"parallel": {"pipeline": 2}}),
    "pp4, micro batches of 4: fewer than stages": (4, {"parallel": {"pipeline": 4}, "batch": {"micro_size": 4}}),
    "pp4, tied, bf16": (4, {"model": {"tied_embeddings": True}, "parallel": {"pipeline": 4}, "dtype": "bf16"}),
    "pp2, dp2, fp16, recomputed": (
        4,
        {"model": {"activation_checkpointing": "full"}, "parallel": {"pipeline": 2}, "dtype": "fp16"},
    ),
    "pp2, tp2, bf16": (4, {"parallel": {"pipeline": 2, "tensor": 2}, "dtype": "bf16"}),
    "pp2, tp2, sp": (4, {"parallel": {"pipeline": 2, "tensor": 2, "sequence": True}}),
    "pp2, tp2, dp2, tied, fp16": (
        8,
        {"model": {"tied_embeddings": True}, "parallel": {"pipeline": 2, "tensor": 2}, "dtype": "fp16"},
    ),
    "pp3, dropout": (3, {"model": {"dropout": 0.1}, "parallel": {"pipeline": 3}}),
}
OFTEN = list(LAYOUTS)[:6]


def values_of(model: dict[str, Any] | None = None, dtype: str = "fp32", **sections: Any) -> dict[str, Any]:
    precision = {"dtype": dtype, "initial_scale_power": 8}
    return make_config(model, precision=precision, **sections).model_dump(mode="json")


def use_deepspeeds(engine: Any) -> None:
    """Let DeepSpeed's own schedule run the engine's passes."""
    ours, theirs = engine.schedule, engine.deepspeed
    if engine.topology.tp.sequence_sharded:
        theirs.is_pipe_partitioned = theirs.is_grad_partitioned = False
    ours.train = theirs.train_batch
    ours.evaluate = lambda pairs: theirs.eval_batch(pairs, bcast_loss=False, reduce_output=None)


def trained(values: dict[str, Any], deepspeeds: bool) -> list[Any]:
    with engine_on_rank(values) as engine:
        if deepspeeds:
            use_deepspeeds(engine)
        config, topology, found = engine.config, engine.topology, []
        for step, tokens in enumerate(global_batches(STEPS), start=1):
            found.append(vars(engine.train_step(step, micro_batches(tokens, config, topology), 1e-3).metrics))
        held_out = micro_batches(global_batches(1, seed=9)[0], config, topology)
        found.append(engine.evaluate([held_out, held_out]))
        found += [state.tensors["weight"].clone() for state in engine.shards()]
    return found


def both_ways(values: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """On a rank: metrics, evaluation and weights after some steps, by our schedule and by DeepSpeed's."""
    return trained(values, False), trained(values, True)


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS]
)
def test_the_same_bits_as_by_deepspeeds_schedule(ranks: Ranks, name: str) -> None:
    world, sections = LAYOUTS[name]
    for ours, theirs in ranks.run(world, both_ways, values_of(**sections)):
        assert len(ours) == len(theirs) > STEPS + 1
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other


def alive(values: dict[str, Any], deepspeeds: bool = False) -> dict[str, Any]:
    """On a rank: how many logits are there when others are made and after the step, and how many stages' inputs."""
    with engine_on_rank(values) as engine:
        if deepspeeds:
            use_deepspeeds(engine)
        module, made, inputs, counts = engine.module, [], [], {"logits": [], "inputs": []}
        loss = module.loss_fn

        def living(things: list[Any]) -> int:
            gc.collect()
            return sum(thing() is not None for thing in things)

        def seen(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            made.append(weakref.ref(logits.untyped_storage()))
            counts["logits"].append(living(made))
            return loss(logits, targets)

        def entered(module: Any, given: Any) -> None:
            inputs.append(weakref.ref(given[0]))
            counts["inputs"].append(living(inputs))

        module.loss_fn = seen
        module.register_forward_pre_hook(entered)
        tokens = micro_batches(global_batches(1)[0], engine.config, engine.topology)
        engine.train_step(1, tokens, 1e-3)
        most = {name: max(numbers, default=0) for name, numbers in counts.items()}
        after = living(made) + living(inputs)
        engine.evaluate([tokens])
        return {**most, "after": after, "logits evaluated": living(made)}
