"""The order of samples: a keyed pseudo-random permutation, computed for one index at a time.

A Feistel network over pairs of residues (Luby and Rackoff 1988) permutes a range slightly larger than n; walking the
cycle until it is back inside restricts it to exactly n (Black and Rogaway 2002). Time and memory do not depend on n.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from math import isqrt

ROUNDS = 8


def permute(index: int, length: int, key: bytes) -> int:
    """Where `index` goes under the permutation of `range(length)` that `key` (16 .. 64 bytes) selects."""
    if not 0 <= index < length:
        raise IndexError(f"{index} is not in range({length})")
    side = isqrt(length - 1) + 1  # the network permutes side * side >= length pairs, at most 2 * side too many
    while True:
        left, right = divmod(index, side)
        for round_ in range(ROUNDS):
            message = bytes((round_,)) + right.to_bytes(16, "little")
            mixed = int.from_bytes(blake2b(message, key=key, digest_size=16).digest(), "little")
            left, right = right, (left + mixed) % side
        index = left * side + right
        if index < length:
            return index


@lru_cache(maxsize=64)
def _key(seed: int, epoch: int) -> bytes:
    return blake2b(f"sample order, seed {seed}, epoch {epoch}".encode(), digest_size=32).digest()


class SampleOrder:
    """Endless order over `range(length)`: each epoch visits everything once, in a permutation of its own."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed

    def sample(self, k: int) -> tuple[int, int]:
        """Epoch and index of the k-th sample, both from 0; O(1) in time and memory."""
        epoch, index = divmod(k, self.length)
        return epoch, permute(index, self.length, _key(self.seed, epoch))
