"""What is used of DeepSpeed that it does not promise to keep.

It is looked for at every start, so that a version that has moved it is named before anything is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
from deepspeed.pipe import PipelineModule
from torch import nn

from megatron_stable.errors import ConfigError

KNOWN = ">=0.19.8,<0.20"  # the versions that the tests have seen; setup.py accepts the same
PIPELINE = ("_partition_layers", "_set_bounds", "get_tied_weights_and_groups")
PIPELINE_ENGINE = (
    "_exec_reduce_tied_grads",
    "_exec_reduce_grads",
    "_exec_optimizer_step",
    "_running_engine_backward",
)
ENGINE = (
    "zero_optimization_stage",
    "bfloat16_enabled",
    "communication_data_type",
    "buffered_allreduce_fallback",
    "mpu",
)
BF16_ZERO_1 = (
    "fp32_groups_gradients_flat",
    "fp32_groups_gradient_flat_partition",
    "fp32_groups_flat_partition",
    "fp32_groups_gradients",
    "fp32_groups_has_gradients",
    "accumulate_hp_grads_and_remove_lp",
    "update_lp_params",
    "clear_hp_grads",
    "clear_lp_grads",
)
FP32_ZERO_1 = (
    "bit16_groups",
    "bit16_groups_flat",
    "parallel_partitioned_bit16_groups",
    "single_partition_of_fp32_groups",
    "process_gradients",
    "reduce_gradients",
    "_grad_acc_hooks",
)
ZERO_1_2 = ("averaged_gradients", "update_lp_params")
ZERO_3 = (
    "averaged_gradients",
    "sub_group_to_group_id",
    "fp32_partitioned_groups_flat",
    "grad_position",
    "get_param_id",
    "dp_process_group",
    "persistent_parameters",
    "fp16_groups",
    "_reassign_or_swap_out_partitioned_parameters",
    "unscale_and_clip_grads",
)
SCALER = (
    "dynamic", "cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis", "update_scale",
    "raise_error_at_min_scale",
)  # fmt: skip
FRAGMENT = ("lp_fragment_address", "hp_fragment_address", "hp_fragment")


def require_pipeline() -> None:
    """See that DeepSpeed's pipeline is as it was.

    Raises:
        ConfigError: On all ranks alike: it is not.
    """
    _require([(PipelineModule, PIPELINE)])


def require_engine(engine: Any, module: nn.Module) -> None:
    """See that ``engine``, which DeepSpeed has just made of ``module``, is as it was.

    Raises:
        ConfigError: On all ranks alike: it is not.
    """
    _require(_used(engine, module))


def _used(engine: Any, module: nn.Module) -> Iterator[tuple[Any, tuple[str, ...]]]:
    yield engine, (*ENGINE, "optimizer")
    if isinstance(module, PipelineModule):
        yield engine, PIPELINE_ENGINE
    stage, bf16, optimizer = engine.zero_optimization_stage(), engine.bfloat16_enabled(), engine.optimizer
    yield optimizer, (*(() if bf16 and stage == 1 else ("_global_grad_norm",)), "optimizer", "step")
    yield optimizer, ZERO_3 if stage == 3 else BF16_ZERO_1 if bf16 and stage == 1 else ZERO_1_2
    if stage == 1 and not bf16 and not engine.fp16_enabled():
        yield optimizer, FP32_ZERO_1
    for weight in module.parameters():
        if stage == 3:
            yield weight, ("ds_tensor", "ds_numel")
            yield weight.ds_tensor, ("ds_numel",)  # type: ignore[attr-defined]
        else:
            yield weight, ("_hp_mapping",)
            if weight._hp_mapping is not None:  # type: ignore[attr-defined]
                yield weight._hp_mapping, FRAGMENT  # type: ignore[attr-defined]
    if engine.fp16_enabled():
        yield optimizer, ("loss_scaler",)
        yield optimizer.loss_scaler, SCALER


def _require(used: Any) -> None:
    for holder, names in used:
        for name in names:
            if not hasattr(holder, name):
                owner = holder.__name__ if isinstance(holder, type) else type(holder).__name__
                error = ConfigError(
                    f"DeepSpeed {deepspeed.__version__} has no {owner}.{name}, which training needs: install a version "
                    f"that is known to work, pip install 'deepspeed{KNOWN}'"
                )
                error.agreed = True
                raise error
