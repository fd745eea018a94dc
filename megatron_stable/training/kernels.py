"""Whose kernels a run computes with: apex's, flash-attn's, or PyTorch's, and the same on all ranks."""

from __future__ import annotations

import socket

import torch

from megatron_stable import apex
from megatron_stable.apex import Found
from megatron_stable.config.attention import limits
from megatron_stable.config.schema import Config, RunConfig
from megatron_stable.engine.construction import DTYPES
from megatron_stable.errors import ConfigError
from megatron_stable.model import flash
from megatron_stable.model.backends import Choice, choose_backend, sdpa_kernel
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
    usable, why, absent = _on_all_ranks(mine)
    if usable:
        apex.take()
        return f"AdamW and RMSNorm by {why}"
    if run.apex == "require":
        raise agreed(ConfigError, f"run.apex is require, but {why}; or set run.apex=auto")
    return None if absent else f"AdamW and RMSNorm by PyTorch: {why}"


def choose_attention(config: Config) -> Choice:
    """The attention backend; with a cap, on GPUs, flash-attn's if every rank has one that works. Collective.

    Raises:
        ConfigError: The one that the configuration names does not run here.
    """
    model, dtype, on_gpu = config.model, DTYPES[config.precision.dtype], torch.cuda.is_available()
    flash.take(False)
    documents = config.data.document_mask
    choice = choose_backend(model, "cuda" if on_gpu else "cpu", documents)
    if not on_gpu:
        return choice
    device = torch.device("cuda")
    if choice.name == "sdpa" and documents:
        return choice._replace(reason=f"{choice.reason}; documents are masked by a matrix, which is slow on a GPU")
    if choice.name == "sdpa":
        return choice._replace(reason=f"{choice.reason}; its kernel is {sdpa_kernel(model, dtype, device)}")
    no_other = model.attention != "auto" or (model.attention_cap is None and not documents)
    if no_other or any(limits("flash", model, config.precision.dtype)):
        return choice
    usable, why, _ = _on_all_ranks(flash.try_out(model, dtype, device, documents))
    flash.take(usable)
    choice = choose_backend(model, "cuda", documents)
    return choice._replace(reason=f"{why}: {choice.reason}" if usable else f"{choice.reason}; {why}")


def _on_all_ranks(mine: Found) -> Found:
    """What is found on this rank, if it is usable on all, else what the first where it is not has found. Collective."""
    found = everywhere((mine, socket.gethostname()))
    at_fault = next(((each, host) for each, host in found if not each.usable), None)
    if at_fault is None:
        return mine
    return Found(False, f"{at_fault[0].sentence} (on {at_fault[1]})", all(each.absent for each, _ in found))
