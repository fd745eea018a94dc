"""The memory of a rank of each pipeline stage at the fullest moment of a step, by kind.

That moment is in the backward pass of a micro batch while all others that the schedule allows are in flight: under
1F1B (``engine/schedule.py``) min(micro batches, stages - stage).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from megatron_stable.analysis.activations import Layers
from megatron_stable.analysis.footprint import Footprint, footprints, weights_are_masters
from megatron_stable.analysis.tape import Tape, Value
from megatron_stable.config.schema import Config
from megatron_stable.model.transformer import layer_list
from megatron_stable.parallel.stages import stage_bounds
from megatron_stable.parallel.topology import TensorParallel

FP32 = 4
# parameters that ZeRO-3 leaves gathered until they are used again (DeepSpeed's stage3_max_live_parameters, its default)
LIVE = 1_000_000_000


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a pipeline stage.

    Attributes:
        parameters: That it has, of its stage and TP slice.
        blocks: Transformer blocks of the stage.
        in_flight: Micro batches whose activations it holds at most.
        weights, gradients, optimizer: See :class:`~megatron_stable.analysis.footprint.Footprint`.
        buckets: DeepSpeed's buffers for reduction.
        per_micro_batch: What one micro batch keeps for backward, without logits.
        activations: That of all in flight, and what the pipeline keeps to send and receive.
        logits: Logits of the last stage.
        working: What the backward pass needs beside these where it needs most: gradients of activations, a weight's
            gradient and its fp32 copy, a chunk of the loss.
        measured: The copy of its fp32 masters with which an update is measured, when activations are gone.
        reserve: For the CUDA context, libraries and NCCL.
    """

    parameters: int
    blocks: int
    in_flight: int
    weights: float
    gradients: float
    optimizer: float
    buckets: float
    per_micro_batch: float
    activations: float
    logits: float
    working: float
    measured: float
    reserve: float

    @property
    def total(self) -> float:
        """Bytes at the fullest moment."""
        states = self.weights + self.gradients + self.optimizer + self.buckets
        return states + max(self.backward, self.measured) + self.reserve

    @property
    def backward(self) -> float:
        """Bytes that are there in the backward pass alone."""
        return self.activations + self.logits + self.working


def memory(config: Config, world: int, device: str = "cuda", reserve: float = 0.0) -> list[StageMemory]:
    """One for each pipeline stage of ``world`` ranks; ``config.model.vocab_size`` must be known.

    Args:
        device: "cuda" or "cpu", on which it depends what kernels keep for backward.
        reserve: Bytes for the CUDA context, libraries and NCCL.
    """
    stages = footprints(config, world)
    names = stage_layers(config)
    replicas = world // (config.parallel.tensor * config.parallel.pipeline)
    micro_batches = config.batch.global_size // (config.batch.micro_size * replicas)
    return [
        _stage(config, number, own, held, replicas, micro_batches, device, reserve)
        for number, (own, held) in enumerate(zip(names, stages, strict=True))
    ]


def stage_layers(config: Config) -> list[list[str]]:
    """Names of the layers of each stage."""
    layers = layer_list(config.model, TensorParallel(None, 0, config.parallel.tensor), 0, draw=False)
    is_block = [layer.name.startswith("blocks.") for layer in layers]
    bounds = stage_bounds([layer.cost for layer in layers], is_block, config.parallel.pipeline)
    return [[layer.name for layer in layers[low:high]] for low, high in pairwise(bounds)]


def _stage(
    config: Config,
    number: int,
    names: list[str],
    held: Footprint,
    replicas: int,
    micro_batches: int,
    device: str,
    reserve: float,
) -> StageMemory:
    layers, stages = Layers(config, device), config.parallel.pipeline
    first, last = number == 0, number == stages - 1
    tape, logits = Tape(), Value(0.0)
    x = received = Value(0.0 if first else layers.stream)
    for name in names:
        if name == "embedding":
            x = layers.embedding(tape)
        elif name == "final_norm" or (name == "head" and config.model.deepnorm):
            x = layers.final_norm(tape, x)
        if name.startswith("blocks."):
            x = layers.block(tape, x, int(name.removeprefix("blocks.")))
        elif name == "head":
            logits = layers.head(tape, x)
            layers.loss(tape, logits)
    if not last:  # the gradient comes from the next stage
        tape.put(0.0, x, through=True)
    kept = tape.kept(logits, received)
    in_flight = min(micro_batches, stages - number)
    # received and held for its gradient; on its way: the gradient before this one, and the output; received: a gradient
    piped = layers.stream * ((in_flight + 1) * (not first) + 2 * (not last))
    copies = FP32 / layers.width if layers.width < FP32 else 0.0
    zero = config.parallel.zero_stage
    # under fp16 ZeRO-1 adds gradients to their sums when all are there; under fp32 the first ones are the sums
    begins = zero == 1 and config.precision.dtype == "fp32" and micro_batches == 1 and not weights_are_masters(config)
    grows = begins or (zero == 1 and config.precision.dtype == "fp16")
    working = tape.most(copies, grows, (logits, received)) - kept
    if begins:  # at the end of the backward pass there is nothing but gradients
        working = max(working, held.gradients - in_flight * kept - logits.size)
    return StageMemory(
        held.parameters,
        sum(name.startswith("blocks.") for name in names),
        in_flight,
        held.weights + (layers.width * min(held.parameters, LIVE) if zero == 3 else 0.0),
        0.0 if begins else held.gradients,
        held.optimizer,
        held.buckets,
        kept,
        in_flight * kept + piped,
        logits.size,
        working,
        FP32 * held.parameters / replicas
        if config.logging.probes_every and "updates" in config.logging.probes
        else 0.0,
        reserve,
    )
