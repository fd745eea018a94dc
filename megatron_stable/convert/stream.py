"""Write a safetensors file tensor by tensor, in any order, without holding it in memory.

The safetensors library writes whole files only. The format is a JSON header, its length in front as a little-endian
64-bit integer, and the tensors' bytes behind it at the offsets that the header names.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

BYTES = 4  # of an fp32 element


class TensorStream:
    """A safetensors file of 1-d fp32 tensors whose sizes are known beforehand.

    Args:
        path: Created at its full size at once, so that a full disk shows before any work is done.
        sizes: Elements of each tensor, by key.
        metadata: Strings for the header.
    """

    def __init__(self, path: Path, sizes: Mapping[str, int], metadata: Mapping[str, str]) -> None:
        self.path, self.offsets, end = path, dict[str, int](), 0
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        for key, numel in sizes.items():
            begin, end = end, end + numel * BYTES
            header[key] = {"dtype": "F32", "shape": [numel], "data_offsets": [begin, end]}
            self.offsets[key] = begin
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the reader wants the data aligned
        self.start = 8 + len(text)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            if end:
                os.posix_fallocate(file.fileno(), self.start, end)

    def write(self, key: str, tensor: Tensor) -> None:
        """Put a tensor in its place."""
        with self.path.open("r+b") as file:
            file.seek(self.start + self.offsets[key])
            file.write(tensor.contiguous().numpy().data)

    def sync(self) -> None:
        """Make what was written durable."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
