"""Stand up one rank, real or imagining the others, and measure what a training step of it allocates."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

import torch

from megatron_stable.config.schema import Config
from tests.harness.fp16 import fp16_on_cpu
from tests.scale.counting import _held, imagine_stages

MARK = "the measured step"


def allocate_on_rank(values: dict[str, Any], bucket: int | None = None, alone: bool = True) -> dict[str, Any]:
    """On a rank: the engine takes steps on random tokens.

    What is allocated is what PyTorch's allocator is asked for, kernels' own needs included.

    Args:
        bucket: Elements of DeepSpeed's buffers for reduction, which would otherwise be larger than a small model.
        alone: Whether this rank imagines the others.

    Returns:
        ``states``: bytes of all tensors between two steps, by kind; ``peak``: bytes at the fullest moment of the last
        step, what the engine had before the first included.
    """
    from megatron_stable.engine import deepspeed_config
    from megatron_stable.engine.engine import Engine
    from megatron_stable.parallel.topology import Topology

    deepspeed_config.BUCKET = bucket or deepspeed_config.BUCKET
    config = Config.model_validate(values)
    topology = Topology(config.parallel.tensor, config.parallel.pipeline, config.parallel.sequence)
    fp16 = fp16_on_cpu() if config.precision.dtype == "fp16" else nullcontext()
    with fp16:
        engine = Engine(config, topology)
        batch, length = config.batch.micro_size, config.model.sequence_length
        if alone:
            imagine_stages()

        def train(step: int) -> None:
            tokens = (batch, length + 1)
            batches = [torch.randint(0, config.model.vocab_size or 2, tokens) for _ in range(engine.accumulation)]
            engine.train_step(step, batches, 1e-3)

        before = sum(_held(engine).values())
        with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profile:
            train(1)
            gc.collect()
            states = _held(engine)
            with torch.autograd.profiler.record_function(MARK):
                train(2)
    events = sorted(profile.kineto_results.events(), key=lambda event: event.start_ns())
    began = next(event.start_ns() for event in events if event.name() == MARK)
    live, peak = before, 0
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live) if event.start_ns() >= began else 0
    return {"states": states, "peak": peak}
