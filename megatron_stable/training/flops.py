"""How much arithmetic a step is, and what the device could do at most: model FLOPs utilisation (PaLM, App. B)."""

from __future__ import annotations

import torch

from megatron_stable.config.schema import ModelConfig
from megatron_stable.model.transformer import layer_list
from megatron_stable.parallel.topology import TensorParallel

# dense peak in FLOP/s of bf16 and fp16 matrix units, by the vendor's data sheet
PEAKS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "H20": 148e12, "A100": 312e12, "A800": 312e12, "B200": 2250e12}


def flops_per_token(config: ModelConfig) -> float:
    """Floating-point operations per token of forward and backward, recomputation not counted.

    Matrix products only, three times those of forward; attention is counted over the full s x s, as PaLM,
    Megatron-LM and nanoGPT do.
    """
    return 3.0 * sum(layer.cost for layer in layer_list(config, TensorParallel(), seed=0))


def peak_flops(dtype: str) -> float | None:
    """Peak FLOP/s of the device of this rank at ``dtype`` ("bf16", "fp16"), or ``None`` where it is not known."""
    if not torch.cuda.is_available() or dtype == "fp32":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in PEAKS.items() if key in name), None)
