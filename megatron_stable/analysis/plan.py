"""A plan: what a configuration on so many GPUs of a machine is predicted to need, in numbers that people and programs read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_stable.analysis.durability import Durability, durability
from megatron_stable.analysis.footprint import Footprint, footprints
from megatron_stable.analysis.layouts import Candidate, remedies
from megatron_stable.analysis.machines import Machine
from megatron_stable.analysis.memory import StageMemory, memory
from megatron_stable.analysis.speed import Speed, speed
from megatron_stable.config.checks import check
from megatron_stable.config.schema import Config
from megatron_stable.model.transformer import parameter_count


@dataclass(frozen=True)
class Plan:
    """What is predicted.

    Attributes:
        parameters: Of the model, without padding of the vocabulary.
        outside_embeddings: Those outside embedding and head.
        micro_batches: Of a replica, per step.
        stages: Memory by pipeline stage.
        traffic: What a rank of each stage holds and sends.
        tokens: That the run trains on.
        days, cost: For these tokens, failures included.
        remedies: Changes that would make it fit; empty if it does, or if nothing would.
    """

    config: Config
    world: int
    machine: Machine
    parameters: int
    outside_embeddings: int
    micro_batches: int
    stages: list[StageMemory]
    traffic: list[Footprint]
    speed: Speed
    durability: Durability
    tokens: float
    days: float
    cost: float
    remedies: list[Candidate]

    @property
    def fullest(self) -> int:
        """The number of the stage that needs most memory."""
        return max(range(len(self.stages)), key=lambda number: self.stages[number].total)

    @property
    def fits(self) -> bool:
        """Whether every stage does."""
        return self.stages[self.fullest].total <= self.machine.usable

    def summary(self) -> dict[str, Any]:
        """As JSON: bytes, seconds, and the machine with its assumptions."""
        limited = {**asdict(self.speed), "limited_by": self.speed.limit}
        return {
            "ranks": self.world,
            "machine": self.machine.model_dump(),
            "parameters": {"total": self.parameters, "outside_embeddings": self.outside_embeddings},
            "micro_batches": self.micro_batches,
            "stages": [
                {**asdict(held), "total": held.total, "sent": {"dp": sent.dp_bytes, "tp": sent.tp_bytes, "pp": sent.pp_bytes}}
                for held, sent in zip(self.stages, self.traffic, strict=True)
            ],
            "usable_memory": self.machine.usable,
            "fits": self.fits,
            "fullest_stage": self.fullest,
            "remedies": [{"changes": one.changes, "memory": one.memory} for one in self.remedies],
            "speed": limited,
            "run": {"tokens": self.tokens, "days": self.days, "cost": self.cost},
            "checkpoints": {**asdict(self.durability), "every": self.config.checkpoint.every},
        }


def make_plan(config: Config, world: int, on: Machine, tokens: float | None = None) -> Plan:
    """Plan a run; ``config.model.vocab_size`` must be known.

    Args:
        world: Ranks, one per GPU.
        tokens: To train on; ``None``: what ``run.steps`` trains on.

    Raises:
        ConfigError: The configuration cannot run on so many ranks.
    """
    check(config, world)
    stages = memory(config, world, on.device, on.reserve)
    predicted = speed(config, world, on)
    lasting = durability(config, world, on, predicted.seconds)
    budget = tokens or config.run.steps * config.tokens_per_step
    seconds = budget / predicted.tokens_per_second * (1 + lasting.overhead)
    total, inner = parameter_count(config.model)
    replicas = world // (config.parallel.tensor * config.parallel.pipeline)
    fits = max(stage.total for stage in stages) <= on.usable
    return Plan(
        config,
        world,
        on,
        total,
        inner,
        config.batch.global_size // (config.batch.micro_size * replicas),
        stages,
        footprints(config, world),
        predicted,
        lasting,
        budget,
        seconds / 86400,
        seconds / 3600 * world * on.price_per_gpu_hour,
        [] if fits else remedies(config, world, on),
    )
