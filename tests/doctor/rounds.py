"""What tests of the doctor run on ranks."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_stable.config.schema import Config
from megatron_stable.doctor.crew import Crew
from megatron_stable.doctor.finding import Finding
from tests.harness.fp16 import fp16_on_cpu


def crew(hosts: tuple[str, ...] | None = None, directory: Path = Path(), config: Config | None = None) -> Crew:
    """Of this world; ``hosts``: on which machine each rank is to believe itself and others."""
    names = hosts or ("here",) * dist.get_world_size()
    return Crew(dist.get_rank(), names, torch.device("cpu"), config, directory)


def compare_on_ranks(given: list[dict[str, Any]]) -> list[Finding]:
    """On a rank: the finding of each configuration, shrunken."""
    from megatron_stable.doctor.numerics import compare, shrunken

    found = []
    for values in given:
        config = shrunken(Config.model_validate(values), dist.get_world_size())
        with fp16_on_cpu() if config.precision.dtype == "fp16" else nullcontext():
            found.append(compare(config, crew()))
    return found


def compare_with_a_wrong_layer(values: dict[str, Any], wrong: int, factor: float) -> list[Finding]:
    """The same, with the gradient of what one rank's attention yields multiplied by a factor."""
    from megatron_stable.model import attention

    if dist.get_rank() == wrong:
        whole = attention.Attention.forward

        @functools.wraps(whole)
        def scaled(self: Any, *args: Any) -> torch.Tensor:
            out = whole(self, *args)
            out.register_hook(lambda grad: grad * factor)
            return out

        attention.Attention.forward = scaled
    return compare_on_ranks([values])
