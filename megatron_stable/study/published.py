"""Published rules for learning rate and batch by size or compute, and public models to hold against them; pure.

Sizes are parameters outside embedding and head. Which of these were read, and which second-hand, `evidence` says.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

# GPT-3's eight sizes: layers, width, learning rate, tokens of a batch (arXiv 2005.14165, Table 2.1, with its 5140)
GPT3_SIZES = (
    (12, 768, 6.0e-4, 0.5e6), (24, 1024, 3.0e-4, 0.5e6), (24, 1536, 2.5e-4, 0.5e6), (24, 2048, 2.0e-4, 1e6),
    (32, 2560, 1.6e-4, 1e6), (32, 4096, 1.2e-4, 2e6), (40, 5140, 1.0e-4, 2e6), (96, 12288, 0.6e-4, 3.2e6),
)  # fmt: skip
_GPT3 = np.log([(12 * layers * width**2, rate, tokens) for layers, width, rate, tokens in GPT3_SIZES]).T


def gpt3_learning_rate(parameters: float) -> float:
    """By the line through GPT-3's sizes, on logarithms."""
    return _line(_GPT3[1], parameters)


def gpt3_batch_tokens(parameters: float) -> float:
    """Tokens of a batch, by the line through GPT-3's sizes, on logarithms."""
    return _line(_GPT3[2], parameters)


def deepseek_learning_rate(flops: float) -> float:
    """Of the lowest loss (arXiv 2401.02954, fitted from 1e17 to 2e19 FLOPs)."""
    return float(0.3118 * flops**-0.1250)


def deepseek_batch_tokens(flops: float) -> float:
    """Of the lowest loss (arXiv 2401.02954)."""
    return float(0.2920 * flops**0.3271)


def batch_size(tokens: float, sequence_length: int, micro_size: int) -> int:
    """Sequences of a batch: whole micro batches, their number no more than three binary digits and zeros.

    So it is split evenly over many numbers of replicas, and no more than an eighth from what was wanted.
    """
    count = max(1.0, tokens / sequence_length / micro_size)
    unit = 2 ** max(0, math.floor(math.log2(count)) - 2)
    return round(count / unit) * unit * micro_size


def two_digits(value: float) -> float:
    """Rounded."""
    return float(f"{value:.1e}")


def two_digits_below(value: float) -> float:
    """Rounded down."""
    exponent = math.floor(math.log10(value)) - 1
    return float(f"{math.floor(value / 10**exponent + 1e-9)}e{exponent}")


def short(count: float) -> str:
    """A number of parameters or tokens as people write it: 302M, 2.1B."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * factor:
            return f"{count / factor:.3g}{unit}"
    return f"{count:,.0f}"


def _line(y: np.ndarray[Any, Any], parameters: float) -> float:
    slope, level = np.polyfit(_GPT3[0], y, 1)
    return float(np.exp(level + slope * np.log(parameters)))


class Public(NamedTuple):
    """A model whose peak learning rate is public."""

    parameters: float
    name: str
    learning_rate: float
    source: str


PUBLIC = (
    Public(0.302e9, "the 830M of Rybakov et al.", 3e-4, "arXiv 2410.16682, second-hand"),
    Public(6.5e9, "OLMo 2 7B", 3e-4, "arXiv 2501.00656, code"),
    Public(31e9, "OLMo 2 32B", 6e-4, "arXiv 2501.00656, code"),
    Public(174e9, "BLOOM 176B", 6e-5, "arXiv 2211.05100, code"),
)
