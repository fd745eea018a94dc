"""Triton, where it is, and whether kernels that are written in it run on a device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

__all__ = ["INSTALLED", "jit", "tl", "works"]

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with PyTorch for CUDA, and not with that for CPUs
    INSTALLED, tl = False, None

    def jit(kernel: Any) -> Any:
        """As it is: nobody will start it."""
        return kernel
else:
    INSTALLED, jit = True, triton.jit


def works(run: Callable[[], object], instead: str) -> bool:
    """Whether ``run``, which starts kernels, gets through.

    Without Triton it does not, and nobody wonders. Triton without the C compiler that it calls is told as a warning.

    Args:
        instead: What is done where it does not, for people.
    """
    if not INSTALLED:
        return False
    try:
        run()
    except Exception as error:  # whatever a compiler, a linker or a driver comes up with
        message = f"{instead}, as Triton does not work here ({type(error).__name__}: {error})"
        warnings.warn(message, stacklevel=3)
        return False
    return True
