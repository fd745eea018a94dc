from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_stable.data.skip import SkipWindows
from megatron_stable.errors import DataError
from megatron_stable.stability.interventions import FILE, Intervention, Interventions


def made(name: str, rollback_to: int, *windows: tuple[int, int], **changes: float) -> Intervention:
    return Intervention(
        id=name, time="2026-01-01T00:00:00+00:00", by="guard", rule="divergence", rollback_to=rollback_to,
        windows=windows, **changes,
    )  # fmt: skip


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    assert Interventions.read(tmp_path) is None
    done = Interventions().add(made("a", 300, (301, 500))).add(made("b", 200, (900, 901), learning_rate_factor=0.5))
    done.write(tmp_path)
    assert Interventions.read(tmp_path) == done
    assert done.skip == SkipWindows([(301, 500), (900, 901)])
    assert done.undone() == Interventions(done.items[:1])


def test_factors_multiply() -> None:
    done = Interventions(
        (made("a", 0, learning_rate_factor=0.5), made("b", 0, learning_rate_factor=0.5, clip_factor=0.1))
    )
    assert (done.learning_rate_factor, done.clip_factor) == (0.25, 0.1)
    assert (Interventions().learning_rate_factor, Interventions().clip_factor) == (1, 1)


def test_the_line_of_checkpoints() -> None:
    first, second = made("a", 300), made("b", 200)
    one, two = Interventions((first,)), Interventions((first, second))
    assert one.holds(300, ())
    assert not one.holds(400, ()), "written before the rollback to 300, and after it in steps"
    assert one.holds(400, (first,))
    assert not two.holds(300, (first,))
    assert not two.holds(300, ()), "the first rollback allows it, the second does not"
    assert two.holds(200, ())
    assert two.holds(999, (first, second))
    assert not one.holds(999, (first, second)), "the second was undone, and what came of it with it"
    assert not one.holds(1, (second,))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "interventions.json"),
        (b"{}", "not a list"),
        (b'[{"id": "a"}]', "time"),
        (b"\xff", "interventions.json"),
        (json.dumps([made("a", 1).model_dump() | {"windows": [[5, 3]]}]).encode(), "skip window"),
        (json.dumps([made("a", 1).model_dump() | {"learning_rate_factor": 0}]).encode(), "learning_rate_factor"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(DataError, match=said):
        Interventions.read(tmp_path)


windows = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 9)).map(lambda w: (w[0], w[0] + w[1])), max_size=5)


@given(windows, windows, st.integers(0, 40))
def test_windows_ahead_change_nothing_that_was_trained(old: list, new: list, step: int) -> None:
    trained = SkipWindows(old)
    position = trained.data_step(step) if step else 0
    then = trained.continued(position, SkipWindows(new))
    assert [then.data_step(s) for s in range(1, step + 1)] == [trained.data_step(s) for s in range(1, step + 1)]
    assert step == 0 or then.step(position) == step
    for data_step in range(position + 1, 120):
        assert (data_step in then) == (data_step in SkipWindows(new))


@given(windows, st.integers(1, 40))
def test_windows_set_before_the_start_or_at_a_stop_give_one_order(ahead: list, step: int) -> None:
    """A stop before the first window: as if it had been known from the start."""
    first = min((first for first, _ in ahead), default=10**6)
    stop = min(step, first - 1)
    from_start = SkipWindows().continued(0, SkipWindows(ahead))
    at_stop = SkipWindows().continued(stop, SkipWindows(ahead))
    assert from_start == at_stop
