"""The same bits from the same run on the same kind of GPU, for a price."""

from __future__ import annotations

import os

import torch


def make_deterministic() -> None:
    """Let every kernel add in a fixed order; one that cannot raises RuntimeError when it is called.

    Before the first CUDA kernel and the first collective, which read these variables. What holds across runs of one
    layout on one kind of GPU; another layout, GPU or library version adds in another order. On a CPU all is so anyway.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS: no split sums that race
    os.environ.setdefault("NCCL_ALGO", "Ring")  # NCCL chooses by timing otherwise
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # whose backward has atomic sums
