"""Train a tiny model on a layout, and the same by the plain reference: what the equivalence tests compare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from megatron_stable.config.schema import Config
from tests.harness.fp16 import fp16_on_cpu
from tests.reference import optimizer as reference

VOCAB, SEQUENCE, GLOBAL, MICRO = 61, 16, 8, 1
SMALL = {
    "size": None, "layers": 4, "hidden": 32, "heads": 4, "sequence_length": SEQUENCE, "vocab_size": VOCAB,
}  # fmt: skip


def make_config(model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
    """A configuration of the tiny model; keyword arguments are sections."""
    values: dict[str, dict[str, Any]] = {
        "run": {"steps": 6, "seed": 3},
        "batch": {"global_size": GLOBAL, "micro_size": MICRO},
        # Adam with a small eps hides errors in the scale of gradients, and blows noise up where they are zero
        "optimizer": {"eps": 1e-3, "learning_rate": 3e-3, "weight_decay": 0.1, "clip_grad": 1.0},
        "schedule": {"kind": "cosine", "warmup_steps": 2, "min_learning_rate": 3e-4},
        "loss": {"z_loss": 1e-3},
    }
    for name, fields in sections.items():
        values[name] = {**values.get(name, {}), **fields}
    return Config.model_validate({"model": {**SMALL, **(model or {})}, **values})


def global_batches(steps: int, seed: int = 0) -> list[Tensor]:
    """Token ids ``[GLOBAL, SEQUENCE + 1]`` of each step, skewed so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(GLOBAL, SEQUENCE + 1, generator=generator).square() * VOCAB).long() for _ in range(steps)]


def initial_parameters(config: Config) -> dict[str, Tensor]:
    """Full-size initial parameters by global name, without vocabulary padding."""
    from megatron_stable.config.parametrization import model_multipliers
    from megatron_stable.model.transformer import Transformer, layer_list
    from megatron_stable.parallel.parameters import place
    from megatron_stable.parallel.topology import TensorParallel

    by = model_multipliers(config)
    model = Transformer(layer_list(config.model, TensorParallel(), config.run.seed, multipliers=by))
    return {place(p).name: unpadded(place(p).name, p.detach()) for p in model.parameters()}


def unpadded(name: str, full: Tensor) -> Tensor:
    """A full parameter without the padded rows of the vocabulary."""
    return full[:VOCAB] if name in ("embedding.weight", "head.weight") else full


def train_reference(config: Config, steps: int) -> reference.Trained:
    """The same training by the plain model, in float64."""
    parameters = {name: value.double() for name, value in initial_parameters(config).items()}
    batches = [(tokens[:, :-1], tokens[:, 1:]) for tokens in global_batches(steps)]
    return reference.train(parameters, batches, config, steps)


@contextmanager
def engine_on_rank(values: dict[str, Any]) -> Iterator[Any]:
    """On a rank: the engine of a configuration, in any precision."""
    from megatron_stable.engine.engine import Engine
    from megatron_stable.parallel.topology import Topology

    config = Config.model_validate(values)
    topology = Topology(config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence)
    with fp16_on_cpu() if config.precision.dtype == "fp16" else nullcontext():
        yield Engine(config, topology)


def train_on_ranks(values: dict[str, Any], steps: int, left_out: tuple[int, ...] = ()) -> dict[str, Any]:
    """On a rank: train with the engine; returns metrics per step and this rank's shards of the final parameters.

    ``left_out``: rows of each global batch that are not predicted, but in the evaluation.
    """
    from megatron_stable.optim.schedule import learning_rate
    from megatron_stable.parallel.parameters import place

    with engine_on_rank(values) as engine:
        config, topology, metrics = engine.config, engine.topology, []
        for step, tokens in enumerate(global_batches(steps), start=1):
            tokens[left_out, :] = ~tokens[left_out, :]
            outcome = engine.train_step(step, micro_batches(tokens, config, topology), learning_rate(config, step))
            metrics.append(vars(outcome.metrics))
        (evaluation,) = engine.evaluate([micro_batches(global_batches(1, seed=9)[0], config, topology)])
        parameters = {place(weight).name for weight in engine.module.parameters()}
        shards = [
            (state.shard.described(), state.owned, {key: tensor.clone() for key, tensor in state.tensors.items()})
            for state in engine.shards()
            if state.shard.place.name in parameters  # not sigmaReparam's vectors
        ]
    return {"metrics": metrics, "evaluation": evaluation, "shards": shards}


def train_many_on_ranks(configs: dict[str, dict[str, Any]], steps: int) -> dict[str, dict[str, Any]]:
    """On a rank: :func:`train_on_ranks` for several configurations of one world, one after the other."""
    return {name: train_on_ranks(values, steps) for name, values in configs.items()}


def update_error(value: Tensor, reference: Tensor, start: Tensor, rate: float) -> float:
    """How far a parameter is off, relative to how far it has moved; beside what fp32 rounds off the parameter."""
    moved = float((reference - start).norm()) + 0.01 * rate * reference.numel() ** 0.5
    rounding = 2.0**-23 * float(reference.norm())
    return max(0.0, float((value - reference).norm()) - rounding) / moved


def micro_batches(tokens: Tensor, config: Config, topology: Any) -> list[Tensor]:
    """This replica's micro batches of a global batch."""
    micro, replicas = config.batch.micro_size, topology.data_size
    starts = range(topology.data_rank * micro, len(tokens), replicas * micro)
    return [tokens[start : start + micro] for start in starts]


def assemble(results: list[dict[str, Any]], kind: str = "weight") -> dict[str, Tensor]:
    """Full parameters from the shards of all ranks; every element must be owned exactly once."""
    full: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for result in results:
        for shard, owned, tensors in result["shards"]:
            place, stretch = shard.place, slice(shard.start, shard.start + shard.numel)
            local, mark = (
                place.slice(parts.setdefault(place.name, torch.zeros(place.full_shape))) for parts in (full, seen)
            )
            flat, flat_mark = local.flatten(), mark.flatten()
            flat[stretch] = tensors[kind]
            flat_mark[stretch] += float(owned)
            local.copy_(flat.view_as(local))
            mark.copy_(flat_mark.view_as(mark))
    for name, count in seen.items():
        assert (count == 1).all(), f"{name}: some elements are owned by {count.min()} to {count.max()} ranks"
    return full
