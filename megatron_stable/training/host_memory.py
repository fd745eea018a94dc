"""Memory of a process that trains."""

from __future__ import annotations

import ctypes
import gc

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST = 32 * 2**20  # bytes; glibc takes no larger threshold


def keep_freed_memory() -> bool:
    """Let what a step frees stay with this process, for the next one.

    Else glibc hands it back to the kernel whenever enough of it lies together, and each step gets it anew, zeroed page
    by page. Tensors of more than 32 MB still come from the kernel.

    Returns:
        Whether it stays; other C libraries than glibc have no such switch.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, -1))


def let_go() -> None:
    """Free what nothing refers to any more: a model is full of cycles, and the next one should not stand beside it."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
