from __future__ import annotations

import numpy as np

from megatron_stable.stability.drift import DriftState

PATIENCE = 5


def after(losses: list[float], state: DriftState | None = None, first: int = 1) -> DriftState:
    """What is known after losses from step ``first`` on."""
    state = state or DriftState()
    for step, loss in enumerate(losses, first):
        state = state.followed_by(step, loss, PATIENCE)
    return state


def test_a_slow_rise_began_at_the_lowest_level() -> None:
    falling, rising = np.linspace(4, 3, 50).tolist(), np.linspace(3, 3.4, 100).tolist()
    state = after(rising, after(falling), 51)
    assert state.onset(0.1) == state.since and 45 <= state.since <= 55 + 2 * PATIENCE
    assert state.onset(0.2) is None and after(falling).onset(0.01) is None


def test_spikes_shorter_than_half_its_length_are_not_seen() -> None:
    state = after([3.0] * 30)
    assert after([9.0] * (PATIENCE - 1), state, 31).onset(0.05) is None
    assert after([9.0] * PATIENCE, state, 31).onset(0.05) == state.since


def test_after_it_has_settled_only_a_further_rise_is_one() -> None:
    high = after([3.5] * 30, after([3.0] * 30), 31)
    assert high.onset(0.1) is not None
    settled = after([3.5] * 30, high.settled(), 61)
    assert settled.onset(0.1) is None and after([4.0] * 30, settled, 91).onset(0.1) is not None


def test_it_survives_a_checkpoint() -> None:
    state = after([3.0, 2.5, 2.75] * 10)
    assert DriftState.model_validate_json(state.model_dump_json()) == state
