"""The generated DeepSpeed JSON: its contents, and that DeepSpeed's own configuration class takes it as meant."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_stable.config.schema import Config
from megatron_stable.engine.deepspeed_config import deepspeed_config


def generate(dtype: str, **sections: dict[str, Any]) -> dict[str, Any]:
    precision = {
        "dtype": dtype, "initial_scale_power": 12, "scale_window": 77, "hysteresis": 3, "min_scale": 4.0,
    }  # fmt: skip
    values = {
        "batch": {"global_size": 24, "micro_size": 2},
        "precision": precision,
        **sections,
    }
    return deepspeed_config(Config.model_validate(values), data_size=3)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_batch_zero_and_sums_in_fp32(dtype: str, stage: int) -> None:
    generated = generate(dtype, parallel={"zero_stage": stage})
    assert json.loads(json.dumps(generated)) == generated
    assert generated["train_batch_size"] == 24
    assert generated["train_micro_batch_size_per_gpu"] == 2
    assert generated["gradient_accumulation_steps"] == 4
    assert generated["communication_data_type"] == "fp32" and not generated["timers"]["throughput"]["enabled"]
    assert generated["zero_optimization"]["stage"] == stage
    assert generated["data_types"] == {"grad_accum_dtype": "fp32"}
    assert ("bf16" in generated, "fp16" in generated) == (dtype == "bf16", dtype == "fp16")
    assert not {"optimizer", "scheduler", "tensorboard"} & set(generated) and generated["gradient_clipping"] == 0, (
        "these are ours"
    )


def test_fp16_has_our_dynamic_loss_scale() -> None:
    assert generate("fp16")["fp16"] == {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 12,
        "loss_scale_window": 77,
        "hysteresis": 3,
        "min_loss_scale": 4.0,
    }


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_deepspeed_takes_it_as_meant(dtype: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig
    from torch import float32

    generated = {**generate(dtype), "train_batch_size": 8}  # one replica here, and so a third of the batch
    taken = DeepSpeedConfig(generated)
    assert (taken.train_batch_size, taken.train_micro_batch_size_per_gpu, taken.gradient_accumulation_steps) == (
        8,
        2,
        4,
    )
    assert taken.communication_data_type == float32
    assert taken.zero_optimization_stage == 1 and taken.zero_allow_untested_optimizer
    assert taken.grad_accum_dtype in ("fp32", float32)
    assert taken.bfloat16_config.enabled == (dtype == "bf16")
    assert taken.float16_config.enabled == (dtype == "fp16")
    if dtype == "fp16":
        scale = taken.float16_config
        assert (scale.loss_scale, scale.initial_scale_power, scale.loss_scale_window) == (0, 12, 77)
        assert (scale.hysteresis, scale.min_loss_scale) == (3, 4)
