"""Conflicts between fields that are each valid: both fields, their values, and what to do about it."""

from megatron_stable.config.problems import Problem, fail
from megatron_stable.config.schema import Config


def check(config: Config, world_size: int | None = None) -> None:
    """Refuse a configuration that cannot run.

    Args:
        config: the configuration.
        world_size: ranks of the run; without it, what depends on their number is not checked.

    Raises:
        ConfigError: one line for each conflict, all of them at once.
    """
    fail("configuration", conflicts(config, world_size))


def conflicts(config: Config, world_size: int | None = None) -> list[Problem]:
    """All conflicts in `config`, for a run of `world_size` ranks if that is known."""
    return [*_model(config), *_layout(config), *_batch(config, world_size), *_optimization(config)]


def _model(config: Config) -> list[Problem]:
    model, found = config.model, []
    if model.hidden % model.heads:
        found.append(_indivisible("model.hidden", model.hidden, "model.heads", model.heads))
    elif model.positions == "rope" and model.head_dim % 2:
        found.append(
            Problem(
                ("model.positions", "model.hidden", "model.heads"),
                f"model.positions rope rotates pairs and needs an even head width, but model.hidden {model.hidden} / "
                f"model.heads {model.heads} is {model.head_dim}: change one of them, or set model.positions=learned",
            )
        )
    if model.heads % model.groups:
        found.append(_indivisible("model.heads", model.heads, "model.kv_heads", model.groups))
    if model.attention == "sdpa" and model.attention_cap is not None:
        found.append(
            Problem(
                ("model.attention", "model.attention_cap"),
                f"model.attention sdpa cannot compute model.attention_cap {model.attention_cap:g}: "
                "set model.attention=auto, or model.attention_cap=null",
            )
        )
    if model.attention == "flex" and model.attention_dropout > 0:
        found.append(
            Problem(
                ("model.attention", "model.attention_dropout"),
                f"model.attention flex cannot compute model.attention_dropout {model.attention_dropout:g}: "
                "set model.attention=auto, or model.attention_dropout=0",
            )
        )
    every = model.activation_checkpointing
    if isinstance(every, int) and every > model.layers:
        found.append(
            Problem(
                ("model.activation_checkpointing", "model.layers"),
                f"model.activation_checkpointing {every} would recompute no block, as model.layers is {model.layers}: "
                f"set it to 1..{model.layers}, or to none",
            )
        )
    return found


def _layout(config: Config) -> list[Problem]:
    model, parallel, found = config.model, config.parallel, []
    for name, value in (("heads", model.heads), ("kv_heads", model.groups), ("ffn_hidden", model.ffn)):
        if value % parallel.tensor and not (name == "kv_heads" and model.kv_heads is None):
            found.append(_indivisible(f"model.{name}", value, "parallel.tensor", parallel.tensor))
    if parallel.sequence and model.sequence_length % parallel.tensor:
        problem = _indivisible("model.sequence_length", model.sequence_length, "parallel.tensor", parallel.tensor)
        found.append(
            Problem(
                (*problem.keys, "parallel.sequence"),
                f"{problem.message}, or set parallel.sequence=false (true shards the sequence)",
            )
        )
    if model.layers < parallel.pipeline:
        found.append(
            Problem(
                ("model.layers", "parallel.pipeline"),
                f"model.layers {model.layers} cannot fill parallel.pipeline {parallel.pipeline}, as every stage needs "
                f"a block: set parallel.pipeline to at most {model.layers}, or more model.layers",
            )
        )
    if parallel.zero_stage >= 2 and parallel.pipeline > 1:
        found.append(
            Problem(
                ("parallel.zero_stage", "parallel.pipeline"),
                f"parallel.zero_stage {parallel.zero_stage} shards gradients, which parallel.pipeline "
                f"{parallel.pipeline} accumulates whole: set parallel.zero_stage=1, or parallel.pipeline=1",
            )
        )
    return found


def _batch(config: Config, world_size: int | None) -> list[Problem]:
    batch, parallel = config.batch, config.parallel
    ranks = parallel.tensor * parallel.pipeline
    if world_size is None:
        if batch.global_size % batch.micro_size:
            return [_indivisible("batch.global_size", batch.global_size, "batch.micro_size", batch.micro_size)]
        return []
    if world_size % ranks:
        return [
            Problem(
                ("parallel.tensor", "parallel.pipeline"),
                f"{world_size} ranks cannot be split by parallel.tensor {parallel.tensor} x parallel.pipeline "
                f"{parallel.pipeline} = {ranks}: start a multiple of {ranks} ranks, or change one of the two",
            )
        ]
    data = world_size // ranks
    if batch.global_size % (batch.micro_size * data):
        return [
            Problem(
                ("batch.global_size", "batch.micro_size"),
                f"batch.global_size {batch.global_size} is not divisible by batch.micro_size {batch.micro_size} x "
                f"{data} data-parallel ranks = {batch.micro_size * data}: set batch.global_size to "
                f"{_multiples(batch.global_size, batch.micro_size * data)}, or change batch.micro_size",
            )
        ]
    return []


def _optimization(config: Config) -> list[Problem]:
    optimizer, schedule, precision, steps = config.optimizer, config.schedule, config.precision, config.run.steps
    found = []
    if schedule.kind != "constant":
        if schedule.min_learning_rate > optimizer.learning_rate:
            found.append(
                Problem(
                    ("schedule.min_learning_rate", "optimizer.learning_rate"),
                    f"schedule.min_learning_rate {schedule.min_learning_rate:g} is above optimizer.learning_rate "
                    f"{optimizer.learning_rate:g}, so the rate would rise: lower the first, for example to "
                    f"{optimizer.learning_rate / 10:g}",
                )
            )
        if schedule.warmup_steps >= steps:
            found.append(
                Problem(
                    ("schedule.warmup_steps", "run.steps"),
                    f"schedule.warmup_steps {schedule.warmup_steps} leave nothing of run.steps {steps} for the "
                    f"{schedule.kind} decay: set schedule.warmup_steps below {steps}, or more run.steps",
                )
            )
        elif schedule.kind == "wsd" and schedule.warmup_steps > (
            start := steps - round(steps * schedule.decay_fraction)
        ):
            found.append(
                Problem(
                    ("schedule.warmup_steps", "schedule.decay_fraction", "run.steps"),
                    f"schedule.warmup_steps {schedule.warmup_steps} end after step {start}, where "
                    f"schedule.decay_fraction {schedule.decay_fraction:g} of run.steps {steps} begins: lower one",
                )
            )
    if precision.dtype == "fp16" and 2**precision.initial_scale_power < precision.min_scale:
        found.append(
            Problem(
                ("precision.initial_scale_power", "precision.min_scale"),
                f"precision.initial_scale_power {precision.initial_scale_power} is a loss scale of "
                f"{2**precision.initial_scale_power}, below precision.min_scale {precision.min_scale:g}: "
                "raise the first or lower the second",
            )
        )
    return found


def _indivisible(key: str, value: int, by: str, divisor: int) -> Problem:
    message = (
        f"{key} {value} is not divisible by {by} {divisor}: set {key} to {_multiples(value, divisor)}, or change {by}"
    )
    return Problem((key, by), message)


def _multiples(value: int, divisor: int) -> str:
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else f"{divisor}"
