"""1F1B of our own beside DeepSpeed's: the same bits, fewer bytes held, and nobody waited for who need not be."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

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
OFTEN = list(LAYOUTS)[1:6]  # the others are in the full product


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


def alive(values: dict[str, Any]) -> dict[str, Any]:
    """On a rank: the most logits, and inputs of its first block, that live at once in a step; those that live on."""
    from megatron_stable.model.block import Block

    with engine_on_rank(values) as engine:
        module, loss = engine.module, engine.module.loss_fn
        made: dict[str, list[weakref.ref[Any]]] = {"logits": [], "inputs": []}
        most = dict.fromkeys(made, 0)

        def living(kind: str) -> int:
            gc.collect()
            return sum(thing() is not None for thing in made[kind])

        def note(kind: str, tensor: torch.Tensor) -> None:
            made[kind].append(weakref.ref(tensor.untyped_storage()))
            most[kind] = max(most[kind], living(kind))

        def loss_fn(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            note("logits", logits)
            return loss(logits, targets)

        module.loss_fn = loss_fn
        block = next(layer for layer in module.modules() if isinstance(layer, Block))
        block.register_forward_pre_hook(lambda block, given: note("inputs", given[0]))
        tokens = micro_batches(global_batches(1)[0], engine.config, engine.topology)
        engine.train_step(1, tokens, 1e-3)
        trained = living("logits") + living("inputs")
        engine.evaluate([tokens])
        return {**most, "afterwards": trained + living("logits")}


@pytest.mark.parametrize("micro_size", [1, 4])
def test_a_stage_holds_the_micro_batches_of_1f1b_and_logits_of_one(ranks: Ranks, micro_size: int) -> None:
    values = values_of(parallel={"pipeline": 4}, batch={"micro_size": micro_size})
    for stage, found in enumerate(ranks.run(4, alive, values)):
        expected = {"logits": int(stage == 3), "inputs": min(4 - stage, 8 // micro_size), "afterwards": 0}
        assert found == expected


def held_up(values: dict[str, Any]) -> None:
    """On a rank: the last stage takes the first activation when the first stage has made the second one."""
    with engine_on_rank(values) as engine:
        store = dist.distributed_c10d._get_default_store()
        if engine.topology.last_stage:
            receive: Callable[[], torch.Tensor] = engine.schedule.down.receive

            def late() -> torch.Tensor:
                store.wait(["two are made"])
                return receive()

            engine.schedule.down.receive = late
        else:
            forwards: list[torch.Tensor] = []

            def count(module: Any, given: Any, out: torch.Tensor) -> None:
                forwards.append(out)
                if len(forwards) == 2:
                    store.set("two are made", "")

            engine.module.register_forward_hook(count)
        engine.train_step(1, micro_batches(global_batches(1)[0], engine.config, engine.topology), 1e-3)


def test_who_sends_goes_on(ranks: Ranks) -> None:
    ranks.run(2, held_up, values_of(parallel={"pipeline": 2}), timeout=30.0)


def traffic_on_rank(values: dict[str, Any]) -> dict[str, Any]:
    """On a rank of many that are not there: what a step and an evaluation send, to whom."""
    from tests.scale.counting import Sent, imagine_stages

    with engine_on_rank(values) as engine:
        config, peers = engine.config, set()
        isend = dist.isend
        imagine_stages()

        def noted(tensor: torch.Tensor, dst: int, group: Any = None) -> Any:
            peers.add(dst)
            return isend(tensor, dst, group)

        dist.isend = noted
        length = config.model.sequence_length + 1
        tokens = [torch.zeros(config.batch.micro_size, length, dtype=torch.long)] * engine.accumulation
        with Sent() as sent:
            engine.train_step(1, tokens, 1e-3)
        with Sent() as evaluated:
            engine.evaluate([tokens])
        size = sum(n for (name, _), n in sent.bytes.items() if name == "send")
        return {"peers": peers, "bytes": size, "trained": dict(sent.calls), "evaluated": dict(evaluated.calls)}


def test_of_1024_ranks_each_sends_to_its_neighbours_alone(ranks: Ranks) -> None:
    """What is sent, and how many ranks are waited for, over all stages: one norm a step, one loss an evaluation."""
    world, micro_batches, tensor, stages = 1024, 4, 2, 4
    stage, replicas = world // stages, world // stages // tensor
    values = values_of(
        {"hidden": 256},
        "bf16",
        parallel={"tensor": tensor, "pipeline": stages, "sequence": True},
        batch={"global_size": micro_batches * replicas},
        logging={"probes_every": 0},
    )
    only = (0, stage + 1, world - 1)
    for rank, found in zip(only, ranks.run(world, traffic_on_rank, values, only=only), strict=True):
        neighbours = {rank - stage, rank + stage} & set(range(world))
        sends = {("send", stages): micro_batches} if rank < world - stage else {}  # activations
        assert found["peers"] == neighbours
        assert found["bytes"] == micro_batches * len(neighbours) * 2 * (16 // tensor) * 256
        assert not {(name, n) for name, n in found["trained"] if n not in (tensor, replicas, stages, world)}
        beyond = {(name, n): calls for (name, n), calls in found["trained"].items() if n in (stages, world)}
        gradients = {("send", world): micro_batches} if rank >= stage else {}
        assert beyond == {**sends, **gradients, ("allreduce_", world): 1}
        beyond = {(name, n): calls for (name, n), calls in found["evaluated"].items() if n != tensor}
        assert beyond == {**sends, ("allreduce_", world): 1}
