"""For tests of Triton's kernels, which its interpreter and its compiler run without a GPU."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest
from packaging.version import Version


def _usable() -> bool:
    try:
        return Version(version("triton")) >= Version("3.7")  # the interpreter of older ones fails with today's NumPy
    except PackageNotFoundError:
        return False


needs_triton = pytest.mark.skipif(not _usable(), reason="needs Triton 3.7: pip install triton")
