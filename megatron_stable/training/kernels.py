"""Whose kernels a run computes with: apex's on all ranks, or PyTorch's on all."""

from __future__ import annotations

import socket

import torch

from megatron_stable import apex
from megatron_stable.apex import Found
from megatron_stable.config.schema import RunConfig
from megatron_stable.errors import ConfigError
from megatron_stable.parallel.agreement import agreed, everywhere


def choose_kernels(run: RunConfig) -> str | None:
    """Take apex's kernels if ``run.apex`` lets, and every rank can; returns what to tell the user, if anything.

    Collective, and the same on all ranks: a residual stream that TP ranks share must not be rounded in two ways.

    Raises:
        ConfigError: ``require``, and a rank cannot.
    """
    if run.apex == "never" or (run.apex == "auto" and (run.deterministic or not torch.cuda.is_available())):
        return None
    mine = apex.try_out(torch.device("cuda")) if torch.cuda.is_available() else Found(False, "there is no GPU")
    found = everywhere((mine, socket.gethostname()))
    at_fault = next(((each, host) for each, host in found if not each.usable), None)
    if at_fault is None:
        apex.take()
        return f"AdamW and RMSNorm by {mine.sentence}"
    why = f"{at_fault[0].sentence} (on {at_fault[1]})"
    if run.apex == "require":
        raise agreed(ConfigError, f"run.apex is require, but {why}; or set run.apex=auto")
    return None if all(each.absent for each, _ in found) else f"AdamW and RMSNorm by PyTorch: {why}"
