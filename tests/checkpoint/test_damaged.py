"""Whatever is wrong with one file of a checkpoint is noticed and named, and the previous checkpoint is used."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_stable.checkpoint import store
from megatron_stable.checkpoint.health import Retention
from tests.checkpoint.stored import choose_step, write_checkpoints
from tests.harness.ranks import RankError, Ranks

RANKS = 2
FILES = ["manifest.json", "index.json", "rank_00000.safetensors", "rank_00001.safetensors"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_early(path: Path) -> None:
    """One bit, in the header of what has one."""
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("spoil", [truncate, empty, flip, flip_early])
@pytest.mark.parametrize("file", FILES)
def test_the_previous_checkpoint_is_used(ranks: Ranks, root: Path, spoil: Callable[[Path], None], file: str) -> None:
    path = root / "step_00000002" / file
    spoil(path)
    (step, said), (other_step, nothing) = ranks.run(RANKS, choose_step, str(root))
    assert (step, other_step, nothing) == (1, 1, [])
    (warning,) = said
    assert warning.startswith(f"warning: passed over the checkpoint of step 2: {path}: ")
    assert (path.parent / store.DAMAGED).exists() is (file != "manifest.json")  # which speaks for itself


def test_no_checkpoint_is_no_problem(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(2, choose_step, str(tmp_path / "checkpoints")) == [(None, [])] * 2


def test_if_none_is_left_the_run_does_not_start_anew(ranks: Ranks, root: Path) -> None:
    for step in (1, 2):
        truncate(root / f"step_0000000{step}" / FILES[2])
    with pytest.raises(RankError, match=r"holds 2 checkpoint\(s\), none of which can be used") as caught:
        ranks.run(RANKS, choose_step, str(root))
    assert caught.value.exception == "DataError"
    assert len(store.entries(root)) == 2, "nothing was deleted"


def test_rotation_does_not_count_what_is_damaged(ranks: Ranks, root: Path) -> None:
    """Else the only good checkpoint would be deleted in favour of one whose checksums do not hold."""
    flip(root / "step_00000002" / FILES[2])
    assert ranks.run(RANKS, choose_step, str(root))[0][0] == 1
    ranks.run(RANKS, write_checkpoints, str(root), [3], 2)
    assert [(entry.step, entry.problem is None) for entry in store.entries(root)] == [(1, True), (2, False), (3, True)]
    assert "checksum" in str(store.entries(root)[1].problem)


def test_a_damaged_checkpoint_is_replaced_by_the_next_save_of_its_step(ranks: Ranks, root: Path) -> None:
    flip(root / "step_00000002" / FILES[2])
    ranks.run(RANKS, choose_step, str(root))
    ranks.run(RANKS, write_checkpoints, str(root), [2])
    entries = store.entries(root)
    assert [entry.step for entry in entries] == [1, 2]
    assert all(store.damage(entry) is None for entry in entries)
    assert not list(root.glob(".step*"))


def test_foreign_directories_are_left_alone(ranks: Ranks, root: Path) -> None:
    for name in ("step_1", "backup_of_step_00000001", ".step_00000001.notes", "step_00000001.old"):
        (root / name).mkdir()
    before = {path.name for path in root.iterdir()}
    (root / ".step_00000007.0a1b2c3d").mkdir()
    (root / ".step_00000001.0.deleted").mkdir()
    assert {path.name for path in store.clean(root)} == {".step_00000007.0a1b2c3d", ".step_00000001.0.deleted"}
    assert {path.name for path in root.iterdir()} == before
    assert store.Shelf(root).rotate(Retention(1)) == [1]
    assert {path.name for path in root.iterdir()} == before - {"step_00000001"}


@pytest.mark.parametrize("keep", [1, 2, 9])
def test_rotation_keeps_the_newest(ranks: Ranks, tmp_path: Path, keep: int) -> None:
    said = ranks.run(RANKS, write_checkpoints, str(tmp_path), [1, 2, 10, 11], keep)[0]
    assert [entry.step for entry in store.entries(tmp_path)] == [1, 2, 10, 11][-keep:]
    assert {path.name for path in tmp_path.iterdir()} == {
        "latest", *(f"step_{step:08d}" for step in [1, 2, 10, 11][-keep:]),
    }  # fmt: skip
    assert (tmp_path / "latest").read_text() == "step_00000011\n"
    assert len(said) == 4 and all("complete" in line for line in said)
