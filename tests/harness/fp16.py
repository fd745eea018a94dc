"""fp16 through DeepSpeed's real engine and loss scaler, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


@contextmanager
def fp16_on_cpu() -> Iterator[None]:
    """Let DeepSpeed build an fp16 engine on the CPU: torch computes it there, DeepSpeed's accelerator denies it.

    For use inside a rank's function, around ``deepspeed.initialize`` and the steps.
    """
    import torch
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    dtypes = [torch.float, torch.bfloat16, torch.half]
    with (
        mock.patch.object(CPU_Accelerator, "is_fp16_supported", lambda self: True),
        mock.patch.object(CPU_Accelerator, "supported_dtypes", lambda self: list(dtypes)),
    ):
        yield
