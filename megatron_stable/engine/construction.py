"""The model's layers as a rank trains them: each, as soon as it is built, is drawn, cast, on its device and split.

So a rank holds its own part of the model and one layer at most, where DeepSpeed, left to itself, has ZeRO-3's ranks
build the model whole before it splits it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import deepspeed
import torch
from torch import nn

from megatron_stable.config.parametrization import model_multipliers
from megatron_stable.config.schema import Config
from megatron_stable.model.transformer import Layer, layer_list
from megatron_stable.parallel.drawing import draw_into
from megatron_stable.parallel.parameters import place
from megatron_stable.parallel.topology import Topology

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def training_layers(
    config: Config, topology: Topology, settings: dict[str, Any], device: str, draw: bool
) -> list[Layer]:
    """The layers of a run. Building one is collective over the ranks of its stage.

    Args:
        settings: DeepSpeed's configuration.
        device: "cpu" or "cuda".
        draw: Whether to draw the initial weights, which are NaN else.
    """
    whole, dtype = config.parallel.zero_stage < 3, DTYPES[config.precision.dtype]
    layers = layer_list(
        config.model,
        topology.tp,
        config.run.seed,
        device,
        draw and whole,
        model_multipliers(config),
        dtype,
        config.data.document_mask,
    )

    def split(layer: Layer) -> Layer:
        def build() -> nn.Module:
            module = layer.build()
            deepspeed.zero.Init(module, topology.data_group, config_dict_or_path=settings, mpu=topology)
            if draw:
                for weight in module.parameters():
                    _draw_own(weight, topology.data_rank, config.run.seed)
            return module

        return replace(layer, build=build)

    return layers if whole else [split(layer) for layer in layers]


def _draw_own(weight: Any, rank: int, seed: int) -> None:
    """Draw the part of a replica that ZeRO-3 gave it; the last parts are padded."""
    own, start = weight.ds_tensor, rank * weight.ds_tensor.ds_numel
    numel = max(0, min(own.ds_numel, weight.ds_numel - start))
    draw_into(own[:numel], place(weight), seed, start)
    own[numel:] = 0
