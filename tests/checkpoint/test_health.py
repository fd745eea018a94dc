"""Which checkpoints are healthy, and which rotation may delete."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as settings_
from hypothesis import strategies as st

from megatron_stable.checkpoint import store
from megatron_stable.checkpoint.catalog import summary
from megatron_stable.checkpoint.health import Retention, doomed, judge, mark, verdict
from tests.checkpoint.stored import write_checkpoints
from tests.harness.ranks import Ranks
from tests.training.faults import train_with_faults
from tests.training.runs import metrics, settings, train, write_data

STEPS = st.sets(st.integers(1, 400), min_size=1, max_size=12)


@given(STEPS, st.data(), st.integers(1, 5), st.none() | st.integers(1, 50), st.integers(0, 200))
def test_rotation_never_deletes_what_a_rollback_may_need(
    steps: set[int], data: st.DataObject, keep: int, keep_every: int | None, rollback: int
) -> None:
    healthy = {step for step in sorted(steps) if data.draw(st.booleans())}
    gone = set(doomed(steps, healthy, Retention(keep, keep_every, (rollback,))))
    left = steps - gone
    assert set(sorted(steps)[-keep:]) <= left
    assert len(left) <= keep + 3 + sum(step % (keep_every or 10**9) == 0 for step in steps)
    assert all(step in left for step in steps if keep_every and step % keep_every == 0)
    if healthy:
        newest = max(healthy)
        assert newest in left
        # wherever behind the newest healthy one the spike began, there is one far enough back, if there ever was
        if min(healthy) <= newest - rollback:
            assert any(step in healthy and step <= newest - rollback for step in left)
        else:
            assert min(healthy) in left


@settings_(deadline=None)
@given(
    st.sampled_from([1, 5, 10, 25, 30, 50, 100, 250]),
    st.integers(1, 4),
    st.sampled_from([(100,), (100, 200, 400), (30,)]),
    st.sampled_from([1, 20, 50]),
)
def test_a_run_that_goes_well_always_has_one_not_too_far_back(
    every: int, keep: int, rollbacks: tuple[int, ...], healthy_after: int
) -> None:
    """What is kept ages into what a rollback needs, whatever the distances: never is the first step all there is."""
    rule, steps = Retention(keep, None, rollbacks, healthy_after), [0]
    for now in range(every, 3000, every):
        steps.append(now)
        healthy = [step for step in steps if judge(step, now, (), healthy_after)]
        gone = doomed(steps, healthy, rule)
        steps = [step for step in steps if step not in gone]
    for distance in rollbacks:
        newest = max(healthy)
        best = max(step for step in healthy if step not in gone and step <= newest - distance)
        assert newest - best <= 2 * distance + 3 * every + healthy_after
    assert len(steps) <= keep + 2 + 2 * len(rollbacks) + -(-healthy_after // every)


@pytest.mark.parametrize(
    ("now", "bad", "expected"),
    [
        (149, [], None),
        (150, [], True),
        (150, [100], True),  # before the checkpoint was taken
        (150, [101], False),
        (120, [110], False),  # it need not wait
        (200, [150], False),
        (200, [151], True),
    ],
)
def test_verdict_of_the_checkpoint_of_step_100(now: int, bad: list[int], expected: bool | None) -> None:
    assert judge(100, now, bad, healthy_after=50) is expected


def test_rotation_of_real_checkpoints_follows_their_health(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(1, write_checkpoints, str(tmp_path), [10, 20, 30, 40, 50], 9)
    store.Shelf(tmp_path).judge(now=50, bad=[41], healthy_after=15)
    found = {entry.step: verdict(entry.directory) for entry in store.entries(tmp_path)}
    assert found == {10: True, 20: True, 30: False, 40: False, 50: None}
    words = [summary(entry, None, verified=False)["health"] for entry in store.entries(tmp_path)]
    assert words == ["healthy", "healthy", "unhealthy", "unhealthy", "not judged yet"]
    assert store.Shelf(tmp_path).rotate(Retention(keep=1, rollbacks=(5,))) == [30, 40]
    assert [entry.step for entry in store.entries(tmp_path)] == [10, 20, 50]


# one after each step, unless the one before is being written still
EACH = {"every": 1, "keep": 99, "healthy_after": 2}


@pytest.mark.parametrize("mode", ["off", "drop"])
def test_a_run_judges_its_checkpoints_by_its_dropped_updates(ranks: Ranks, tmp_path: Path, mode: str) -> None:
    write_data(tmp_path / "data")
    values = settings(tmp_path, steps=16, guard={"mode": mode}, checkpoint=EACH)
    faults = [{"kind": "nan_gradient", "data_steps": (1, 5)}, {"kind": "nan_gradient", "data_steps": (11, 11)}]
    ((code, _),) = ranks.run(1, train_with_faults, values, faults)
    assert code == 0
    dropped = [step for step, record in metrics(tmp_path / "run").items() if record["skipped"]]
    assert dropped == [1, 2, 3, 4, 5, 11]
    found = {entry.step: verdict(entry.directory) for entry in store.entries(tmp_path / "run" / "checkpoints")}
    expected = {step: None if step > 14 else step not in (1, 2, 3, 4, 9, 10) for step in range(1, 17)}
    assert found == {step: expected[step] for step in found}
    assert {*found.values()} == {True, False, None}


def test_an_overflow_of_fp16_is_no_verdict_on_a_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    """The first loss scale is far too large, so fp16 drops the first updates, which says nothing about the weights."""
    write_data(tmp_path / "data")
    values = settings(
        tmp_path, steps=24, precision={"dtype": "fp16", "initial_scale_power": 26, "hysteresis": 1},
        checkpoint=EACH,
    )  # fmt: skip
    assert ranks.run(1, train, values) == [0]
    dropped = [step for step, record in metrics(tmp_path / "run").items() if record["skipped"]]
    assert dropped == list(range(1, len(dropped) + 1))
    assert 3 < len(dropped) < 18, "or the scale is not a good choice for this test"
    found = {entry.step: verdict(entry.directory) for entry in store.entries(tmp_path / "run" / "checkpoints")}
    assert found == {step: None if step > 22 else True for step in found}
    assert True in found.values()


def test_a_damaged_verdict_is_none(tmp_path: Path) -> None:
    mark(tmp_path, healthy=True, judged_at=9)
    assert verdict(tmp_path) is True
    (tmp_path / "health.json").write_bytes(b"\x80\x04broken")
    assert verdict(tmp_path) is None
