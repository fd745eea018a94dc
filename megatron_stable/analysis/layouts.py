"""Other layouts for the same model and batch on the same number of GPUs: which fit, which are fastest, what would mend one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from megatron_stable.analysis.machines import Machine
from megatron_stable.analysis.memory import StageMemory, memory
from megatron_stable.analysis.speed import Speed, speed
from megatron_stable.config.checks import conflicts
from megatron_stable.config.schema import Config

LARGEST_MICRO = 16  # sequences


@dataclass(frozen=True)
class Candidate:
    """A layout, and what is predicted of it.

    Attributes:
        changes: Keys and values that differ from the configuration it was asked for.
        stages: Memory by pipeline stage.
        speed: Of a step; ``None`` where it does not fit.
    """

    config: Config
    changes: dict[str, Any]
    stages: list[StageMemory]
    speed: Speed | None

    @property
    def memory(self) -> float:
        """Bytes of the fullest stage."""
        return max(stage.total for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.speed is not None

    def overrides(self) -> str:
        """The changes, as the command line takes them."""
        return " ".join(f"{key}={str(value).lower()}" for key, value in self.changes.items())


def candidate(config: Config, world: int, on: Machine, changes: dict[str, Any]) -> Candidate | None:
    """The configuration with some keys changed; ``None`` if it then contradicts itself or the number of ranks."""
    changed = _changed(config, changes)
    if conflicts(changed, world) or changed.model.layers < changed.parallel.pipeline:
        return None
    stages = memory(changed, world, on.device, on.reserve)
    fits = max(stage.total for stage in stages) <= on.usable
    return Candidate(changed, changes, stages, speed(changed, world, on) if fits else None)


def remedies(config: Config, world: int, on: Machine) -> list[Candidate]:
    """Single changes that make it fit, the fastest first; where none does, the fastest layout that fits, if any."""
    parallel, batch, model = config.parallel, config.batch, config.model
    single: list[dict[str, Any]] = []
    if parallel.tensor > 1 and not parallel.sequence:
        single.append({"parallel.sequence": True})
    if batch.micro_size > 1:
        single += [{"batch.micro_size": size} for size in _powers(batch.micro_size // 2)]
    if model.activation_checkpointing != "full":
        single += [{"model.activation_checkpointing": value} for value in (4, 2, "full")]
    single += [{"parallel.zero_stage": stage} for stage in (2, 3) if stage > parallel.zero_stage]
    single += [{"parallel.tensor": size, "parallel.sequence": True} for size in _powers(on.gpus_per_node)]
    single += [{"parallel.pipeline": size} for size in _powers(world)]
    tried = (candidate(config, world, on, changes) for changes in single)
    found = _ranked(one for one in tried if one is not None)
    return found or search(config, world, on)[0][:1]


def search(config: Config, world: int, on: Machine) -> tuple[list[Candidate], list[str]]:
    """All layouts of ``world`` ranks.

    Returns:
        Those that fit, the fastest first; and one line for each TP x PP of which none does.
    """
    fitting: list[Candidate] = []
    reasons: list[str] = []
    for tensor, pipeline in product(_powers(on.gpus_per_node), _powers(world)):
        if tensor * pipeline > world:
            continue
        possible: list[Candidate] = []
        for alike in _layouts(config, world, tensor, pipeline):
            for changes in alike:
                one = candidate(config, world, on, changes)
                possible += [one] if one is not None else []
                if one is not None and one.fits:
                    break  # to recompute more is slower
        found = [one for one in possible if one.fits]
        fitting += found
        if not possible:
            reasons.append(f"TP {tensor} x PP {pipeline}: {_contradiction(config, world, tensor, pipeline)}")
        elif not found:
            least = min(possible, key=lambda one: one.memory)
            reasons.append(
                f"TP {tensor} x PP {pipeline}: needs {least.memory / 1e9:.1f} GB or more per GPU, "
                f"even with {least.overrides()}; {on.usable / 1e9:.1f} GB are usable"
            )
    return _ranked(fitting), reasons


def _layouts(config: Config, world: int, tensor: int, pipeline: int) -> Iterator[list[dict[str, Any]]]:
    """By micro batch and ZeRO stage, how much is recomputed: from nothing to all, which is slower and needs less."""
    most = max(1, config.batch.global_size * tensor * pipeline // world)
    zero = (1, 2, 3) if pipeline == 1 else (1,)
    for size, stage in product(_powers(min(LARGEST_MICRO, most)), zero):
        yield [
            {
                "parallel.tensor": tensor,
                "parallel.pipeline": pipeline,
                "parallel.sequence": tensor > 1,  # costs no traffic to speak of, and saves memory
                "parallel.zero_stage": stage,
                "batch.micro_size": size,
                "model.activation_checkpointing": again,
            }
            for again in ("none", 4, 2, "full")
        ]


def _contradiction(config: Config, world: int, tensor: int, pipeline: int) -> str:
    changes = {"parallel.tensor": tensor, "parallel.pipeline": pipeline, "parallel.zero_stage": 1, "batch.micro_size": 1}
    found = conflicts(_changed(config, changes), world)
    return found[0].message if found else "no layout is possible"


def _ranked(candidates: Iterator[Candidate] | list[Candidate]) -> list[Candidate]:
    fitting = [one for one in candidates if one.speed is not None]
    return sorted(fitting, key=lambda one: (one.speed.seconds if one.speed else 0.0, one.memory))


def _changed(config: Config, changes: dict[str, Any]) -> Config:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=fields) for name, fields in sections.items()}
    )


def _powers(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length())] if most else []
