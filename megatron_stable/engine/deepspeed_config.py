"""DeepSpeed's JSON, generated from the run's configuration and never written by hand."""

from __future__ import annotations

from typing import Any

from megatron_stable.config.schema import Config


def deepspeed_config(config: Config, data_size: int) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``; ``data_size`` is the number of data-parallel replicas.

    Gradients are accumulated in fp32 whatever the model's dtype, which DeepSpeed would not do by itself.
    Learning rate and logging are ours, so neither appears here.
    """
    precision = config.precision
    generated: dict[str, Any] = {
        "train_batch_size": config.batch.global_size,
        "train_micro_batch_size_per_gpu": config.batch.micro_size,
        "gradient_accumulation_steps": config.batch.global_size // (config.batch.micro_size * data_size),
        "gradient_clipping": config.optimizer.clip_grad if config.optimizer.clipping == "global_norm" else 0.0,
        "zero_optimization": {"stage": config.parallel.zero_stage},
        "zero_allow_untested_optimizer": True,
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**62,  # never
    }
    if config.parallel.sequence:
        # between stages DeepSpeed sends each TP rank's slice of what it takes for equal activations: not so under SP
        generated["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if precision.dtype == "bf16":
        generated["bf16"] = {"enabled": True}
    if precision.dtype == "fp16":
        generated["fp16"] = {
            "enabled": True,
            "loss_scale": 0,  # dynamic
            "initial_scale_power": precision.initial_scale_power,
            "loss_scale_window": precision.scale_window,
            "hysteresis": precision.hysteresis,
            "min_loss_scale": precision.min_scale,
        }
    return generated
