"""Samples that repeat themselves: a few tokens over and over, as broken pages and binary files have them.

Such samples raise the gradient norm, and with it the risk of spikes (OLMo 2, arXiv 2501.00656, §3.1), so that they are
left out of the loss.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from megatron_stable.config.schema import DataConfig


class RepetitionFilter(NamedTuple):
    """Which samples repeat themselves.

    Attributes:
        times: So often, or more, a stretch of tokens comes in a row.
        shortest, longest: Lengths of such stretches, in tokens.
    """

    times: int
    shortest: int = 1
    longest: int = 13

    def finds(self, tokens: np.ndarray) -> bool:
        """Whether token ids `[n]` repeat themselves."""
        return any(self._comes(tokens, period) for period in range(self.shortest, self.longest + 1))

    def _comes(self, tokens: np.ndarray, period: int) -> bool:
        """Whether a stretch of `period` tokens comes `times` times in a row: so many equal those a period before."""
        least = (self.times - 1) * period
        if least >= len(tokens):
            return False
        differ = np.flatnonzero(tokens[period:] != tokens[:-period])
        return bool(np.diff(differ, prepend=-1, append=len(tokens) - period).max() > least)


def repetition_filter(config: DataConfig) -> RepetitionFilter | None:
    """The filter of a run, if it has one."""
    times = config.repetition_filter
    return RepetitionFilter(times, *config.repetition_periods) if times is not None else None


def left_out(tokens: np.ndarray) -> np.ndarray:
    """Token ids as they are handed on where they are read, but not predicted: each as its complement, below 0."""
    return ~tokens
