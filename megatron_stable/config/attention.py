"""What each attention backend cannot compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megatron_stable.config.schema import ModelConfig

FLEX_MIN_HEAD_DIM = 16  # of PyTorch's kernel


class Limit(NamedTuple):
    """A field that a backend cannot compute as it is set.

    Attributes:
        key: ``section.field``.
        value: What it is set to, in words.
        off: A value that the backend can do with.
    """

    key: str
    value: str
    off: str

    def __str__(self) -> str:
        return f"{self.key} {self.value}"


def limits(backend: str, model: ModelConfig, dtype: str | None = None) -> Iterator[Limit]:
    """What a backend cannot compute of a model; nothing for ``math``, which computes all.

    Args:
        dtype: Of the run; ``None``: one that suits.
    """
    cap, clip, dropout = model.attention_cap, model.attention_clip, model.attention_dropout
    if backend == "sdpa" and cap is not None:
        yield Limit("model.attention_cap", f"{cap:g}", "null")
    if backend in ("sdpa", "flex", "flash") and clip is not None:
        yield Limit("model.attention_clip", f"{list(clip)}", "null")
    if backend == "flex" and dropout > 0:
        yield Limit("model.attention_dropout", f"{dropout:g}", "0")
    if backend == "flex" and model.head_dim < FLEX_MIN_HEAD_DIM:
        narrow = f"{model.heads}, which are {model.head_dim} wide, less than {FLEX_MIN_HEAD_DIM}"
        yield Limit("model.heads", narrow, f"{max(1, model.hidden // FLEX_MIN_HEAD_DIM)}")
    if backend == "flash" and dropout > 0 and cap is not None:
        yield Limit("model.attention_dropout", f"{dropout:g} with model.attention_cap {cap:g}", "0")
    if backend == "flash" and dtype == "fp32":
        yield Limit("precision.dtype", "fp32", "bf16")
