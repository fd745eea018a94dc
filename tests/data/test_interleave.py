"""Turns in proportion to weights: the counts are what is handed out, and stay within a bound that is proved."""

from __future__ import annotations

from fractions import Fraction
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_stable.data import Interleave
from megatron_stable.errors import ConfigError

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=10)


def interleave(weights: list[float]) -> Interleave:
    return Interleave({f"source {i}": weight for i, weight in enumerate(weights)})


@settings(max_examples=100, deadline=None)
@given(WEIGHTS, st.integers(1, 300))
def test_counts_are_what_assign_hands_out(weights: list[float], k: int) -> None:
    turns = interleave(weights)
    counts = dict.fromkeys(turns.names, 0)
    for sample in range(k):
        name, own = turns.assign(sample)
        assert own == counts[name], "in order, none left out"
        counts[name] += 1
    assert turns.counts(k) == counts


@settings(max_examples=300, deadline=None)
@given(WEIGHTS, st.integers(0, 10**18))
def test_proportions_hold_for_ever(weights: list[float], k: int) -> None:
    """Within the bound that the module proves, which is (n - 1)/2 at most."""
    counts = list(interleave(weights).counts(k).values())
    exact = [Fraction(repr(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    rest = [sum(shares[i + 1 :]) for i in range(len(shares))]
    assert sum(counts) == k
    for i, (count, share) in enumerate(zip(counts, shares, strict=True)):
        own = Fraction(1, 2) if rest[i] else 0
        bound = own + sum(share / rest[j] for j in range(i)) / 2
        assert abs(count - k * share) <= bound <= max(Fraction(len(shares) - 1, 2), Fraction(0))


@pytest.mark.parametrize("n", [2, 5, 20])
def test_the_bound_is_nearly_reached(n: int) -> None:
    """Each of the rare ones is due a little more than half a turn, and has had one: the last pays for all."""
    weights = [1.0] * (n - 1) + [1e6 - (n - 1)]
    turns = interleave(weights)
    missing = 500_100 * turns.shares[turns.names[-1]] - turns.counts(500_100)[turns.names[-1]]
    assert (n - 1) / 2 - 0.01 < missing <= Fraction(n - 1, 2)


def test_decimal_weights_are_exact() -> None:
    assert list(interleave([0.1, 0.2, 0.7]).counts(10**15).values()) == [10**14, 2 * 10**14, 7 * 10**14]
    assert list(interleave([3, 1]).counts(4000).values()) == [3000, 1000]


def test_turns_are_interleaved() -> None:
    turns = interleave([0.5, 0.25, 0.25])
    wanted = [turns.names[i] for i in (0, 0, 1, 2)]
    assert all(sorted(turns.assign(k + i)[0] for i in range(4)) == wanted for k in range(0, 400, 4))


def test_existing_runs_find_their_order() -> None:
    """What version 0.1 made of these weights, for 3,000 samples from the first on and from the 10^12-th."""
    turns = interleave([0.55, 0.2, 1e-3, 7.25, 0.2])
    said = [turns.assign(first + i) for first in (0, 10**12) for i in range(3000)]
    text = " ".join(f"{name.split()[1]}:{own}" for name, own in said)
    assert sha256(text.encode()).hexdigest() == "ae8ca2a11adae5a32297ebbe6a52c716eccc6e21f75bf55a384efff3ed8b195c"


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_unusable_weights(weight: float) -> None:
    with pytest.raises(ConfigError, match=r"weight .* of source 1 in the blend: it must be a number above 0"):
        interleave([1, weight])
