"""DeepSpeed's JSON, generated from the run's configuration and never written by hand."""

from __future__ import annotations

from typing import Any

from megatron_stable.config.schema import Config

# elements of DeepSpeed's buffer for reduction, fp32: 200 MB; its default is ten times that
BUCKET = 50_000_000


def deepspeed_config(config: Config, data_size: int) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``; ``data_size`` is the number of data-parallel replicas.

    Gradients are accumulated and reduced in fp32 whatever the model's dtype, which DeepSpeed would not do by itself.
    Learning rate, clipping and logging are ours, so none appears here; nor do timers, which stop the device twice per
    micro batch.
    """
    precision = config.precision
    generated: dict[str, Any] = {
        "train_batch_size": config.batch.global_size,
        "train_micro_batch_size_per_gpu": config.batch.micro_size,
        "gradient_accumulation_steps": config.batch.global_size // (config.batch.micro_size * data_size),
        "zero_optimization": {"stage": config.parallel.zero_stage, "reduce_bucket_size": BUCKET},
        "zero_allow_untested_optimizer": True,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": precision.reduce_dtype,
        "timers": {"throughput": {"enabled": False}},
        "gradient_clipping": 0.0,  # ours
        "steps_per_print": 2**62,  # never
    }
    if precision.dtype == "bf16":
        generated["bf16"] = {
            "enabled": True,
            "immediate_grad_update": True,  # no second gradient in bf16
            "check_grad_overflow": False,  # we ask the norm whether it is finite, so that the host waits once
        }
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
