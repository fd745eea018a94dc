"""What one rank of a layout holds and sends, by arithmetic: nothing is allocated, nobody is asked.

``tests/scale`` holds these numbers against what the engine holds and sends, on ranks of worlds up to 1,024.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

from megatron_stable.config.schema import Config, ModelConfig
from megatron_stable.engine.deepspeed_config import BUCKET
from megatron_stable.model.transformer import layer_list
from megatron_stable.parallel.stages import stage_bounds
from megatron_stable.parallel.topology import TensorParallel

FP32, MOMENTS, MASTER_AND_MOMENTS = 4, 8, 12  # bytes per parameter; Adam's two moments
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Footprint:
    """A rank of one pipeline stage.

    Attributes:
        parameters: That its stage and its TP slice have.
        weights, gradients, optimizer: Bytes it holds of each for these, when the gradients of a step are complete.
            Gradients are sums in fp32; the optimizer has the masters and Adam's moments.
        buckets: Bytes of DeepSpeed's buffers for reduction, at most.
        dp_bytes: That it sends to other replicas per step: gradients, then weights; over a ring.
        tp_bytes: That it sends within its TP group per step, for activations and their gradients; over a ring.
        pp_bytes: That it sends to neighbouring stages per step.
    """

    parameters: int
    weights: float
    gradients: float
    optimizer: float
    buckets: float
    dp_bytes: float
    tp_bytes: float
    pp_bytes: float

    @property
    def states(self) -> float:
        """Bytes of all that does not depend on the batch."""
        return self.weights + self.gradients + self.optimizer + self.buckets


def footprints(config: Config, world: int) -> list[Footprint]:
    """One for each pipeline stage of ``world`` ranks; ``config.model.vocab_size`` must be known."""
    parallel, batch, model = config.parallel, config.batch, config.model
    replicas = world // (parallel.tensor * parallel.pipeline)
    width, stage = WIDTH[config.precision.dtype], parallel.zero_stage
    micro_batches = batch.global_size // (batch.micro_size * replicas)
    stream = width * batch.micro_size * model.sequence_length * model.hidden  # bytes of the residual stream
    found = []
    counts, blocks = _stages(model, parallel.tensor, parallel.pipeline)
    for number, (parameters, own_blocks) in enumerate(zip(counts, blocks, strict=True)):
        shared = 1 / replicas
        first, last = number == 0, number == parallel.pipeline - 1
        # Gathers and scatters of the stream; a sum is one of each. Per block: forward two of each, backward as many,
        # and under SP two gathers more, of inputs of which only the shard was kept. Embedding: a sum, and under SP a
        # gather backward. Head: a sum backward, and under SP a gather forward.
        each = 10 if parallel.sequence else 8
        recomputed = 4 * own_blocks if model.activation_checkpointing == "full" else 0
        passes = each * own_blocks + recomputed + 2 * first + (3 if parallel.sequence else 2) * last
        if parallel.pipeline > 1 and not parallel.sequence:  # what comes from another stage comes in slices
            passes += (not first) + (not last)
        reduced = FP32 if config.precision.reduce_dtype == "fp32" else width
        times = {1: 1, 2: 2 * micro_batches, 3: micro_batches}[stage]  # ZeRO-2 all-reduces, every micro batch
        gathered = {1: 1, 2: 1, 3: 2 * micro_batches}[stage]
        found.append(
            Footprint(
                parameters,
                weights=width * parameters * (shared if stage == 3 else 1),
                gradients=FP32 * parameters * (shared if stage >= 2 else 1),
                optimizer=(MOMENTS if weights_are_masters(config) else MASTER_AND_MOMENTS) * parameters * shared,
                buckets=_bucket(config),
                dp_bytes=(1 - shared) * parameters * (reduced * times + width * gathered),
                tp_bytes=passes * stream * (1 - 1 / parallel.tensor) * micro_batches,
                pp_bytes=stream
                * micro_batches
                * ((not last) + (not first))
                / parallel.tensor,  # under SP the shard, else a slice, which the receiver gathers
            )
        )
    return found


def _bucket(config: Config) -> float:
    """Bytes of DeepSpeed's buffer for reduction, which each of its optimizers makes in another dtype.

    ZeRO-1: of the sums; none where the flat gradient is reduced in place. ZeRO-2: of the model. ZeRO-3: of what is
    sent.
    """
    dtype, stage = config.precision.dtype, config.parallel.zero_stage
    if stage == 1:
        return 0 if dtype == "bf16" or weights_are_masters(config) else FP32 * BUCKET
    return WIDTH[dtype if stage == 2 else config.precision.reduce_dtype] * BUCKET


def weights_are_masters(config: Config) -> bool:
    """Whether the optimizer updates the weights themselves."""
    parallel = config.parallel
    return config.precision.dtype == "fp32" and parallel.zero_stage == 1 and parallel.pipeline == 1


def _stages(model: ModelConfig, tensor: int, pipeline: int) -> tuple[list[int], list[int]]:
    """By stage: parameters of a TP slice, and how many blocks."""
    # what does not change the parameters is left out, so that they are counted once
    sizes = _sizes(model.model_copy(update={"attention": "math", "activation_checkpointing": "none"}), tensor)
    layers = layer_list(model, TensorParallel(None, 0, tensor), 0, draw=False)
    is_block = [layer.name.startswith("blocks.") for layer in layers]
    bounds = stage_bounds([layer.cost for layer in layers], is_block, pipeline)
    ranges = [range(low, high) for low, high in pairwise(bounds)]
    return [sum(sizes[i] for i in own) for own in ranges], [sum(is_block[i] for i in own) for own in ranges]


@lru_cache(maxsize=64)
def _sizes(model: ModelConfig, tensor: int) -> list[int]:
    """Parameters of each layer's TP slice."""
    with torch.device("meta"):
        sizes: dict[str, int] = {}
        for layer in layer_list(model, TensorParallel(None, 0, tensor), 0, draw=False):
            known = sizes.get("blocks.0") if layer.name.startswith("blocks.") else None
            sizes[layer.name] = known or sum(weight.numel() for weight in layer.build().parameters())
    return list(sizes.values())
