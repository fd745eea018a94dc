"""Unreadable is not damaged: errors that pass are waited for; others stop the resume, and nothing is decided."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_stable import disk
from megatron_stable.checkpoint import store
from megatron_stable.checkpoint.format import read_manifest
from megatron_stable.checkpoint.health import mark
from megatron_stable.disk import Unreadable
from megatron_stable.records.interventions import write_interventions
from megatron_stable.stability.interventions import Interventions
from tests.checkpoint.stored import choose_step
from tests.harness.ranks import RankError, Ranks

RANKS = 2
FILES = ["manifest.json", "index.json", "rank_00000.safetensors", "rank_00001.safetensors"]


def fail(name: str, number: int, times: int) -> Callable[[], int]:
    """Make system calls on files of a name raise an error so many times; returns how often they did.

    Opening fails, but for EIO, which is an error of reading.
    """
    raised, original_open, original_read = 0, os.open, os.preadv

    def strike(path: Any) -> None:
        nonlocal raised
        if os.fspath(path).endswith(name) and raised < times:
            raised += 1
            raise OSError(number, os.strerror(number))

    def open_(path: Any, *rest: Any, **more: Any) -> int:
        if number != errno.EIO or not name.startswith("rank"):
            strike(path)
        return original_open(path, *rest, **more)

    def preadv(descriptor: int, *rest: Any) -> int:
        if number == errno.EIO:
            strike(Path(f"/proc/self/fd/{descriptor}").readlink())
        return original_read(descriptor, *rest)

    os.open, os.preadv = open_, preadv  # type: ignore[assignment]
    return lambda: raised


def choose_on_a_bad_day(folder: str, name: str, number: int, times: int) -> tuple[int | None, list[str], int]:
    """On a rank: :func:`choose_step`, and how many errors there were."""
    raised = fail(name, number, times)
    return (*choose_step(folder), raised())


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOENT, errno.ETIMEDOUT], ids=errno.errorcode.get)
def test_what_passes_is_waited_for(
    ranks: Ranks, root: Path, file: str, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = ranks.run(RANKS, choose_on_a_bad_day, str(root), file, number, 2)
    assert (first[:2], second[:2]) == ((2, []), (2, []))
    assert first[2] + second[2] == {"manifest.json": 2, "index.json": 4}.get(file, 2 if file == FILES[3] else 4)
    assert not list(root.glob("*/damaged.json"))


@pytest.mark.parametrize("file", FILES)
def test_what_does_not_pass_stops_the_resume_and_decides_nothing(ranks: Ranks, root: Path, file: str) -> None:
    with pytest.raises(RankError, match="checkpoint of step 2 cannot be read, which does not mean") as caught:
        ranks.run(RANKS, choose_on_a_bad_day, str(root), file, errno.EIO, 10**6)
    assert caught.value.exception == "DataError"
    assert not list(root.glob("*/damaged.json"))
    assert ranks.run(RANKS, choose_step, str(root))[0] == (2, []), "the day after"


def delete(path: Path) -> None:
    path.unlink()


def link(path: Path) -> None:
    elsewhere = path.parents[2] / path.name
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("spoil", [delete, link])
@pytest.mark.parametrize("file", FILES)
def test_what_is_gone_is_for_a_person_to_judge(
    ranks: Ranks, root: Path, spoil: Callable[[Path], None], file: str
) -> None:
    newest = root / "step_00000002"
    spoil(newest / file)
    with pytest.raises(RankError, match=f"{newest / file}: ") as caught:
        ranks.run(RANKS, choose_step, str(root))
    assert f"move {newest} away" in str(caught.value)
    assert not list(root.glob("*/damaged.json"))
    newest.rename(root.parent / "away")
    assert ranks.run(RANKS, choose_step, str(root))[0] == (1, [])


def test_rotation_leaves_what_it_cannot_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And counts it again when it can."""
    from megatron_stable.checkpoint.health import Retention

    monkeypatch.setattr(disk, "DELAYS", ())
    shelf, manifest = store.Shelf(root), root / "step_00000001/manifest.json"
    manifest.rename(root.parent / "away")
    assert shelf.rotate(Retention(1)) == []
    assert [entry.usable for entry in shelf.entries()] == [False, True]
    (root.parent / "away").rename(manifest)
    assert shelf.rotate(Retention(1)) == [1]


@pytest.mark.parametrize("name", ["checkpoints", "format.json", "interventions.json", "manifest.json", "health.json"])
def test_a_rollback_waits_for_what_passes(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A run in progress looks at the files that say where it can go back to."""
    run = root.parent
    (run / "format.json").write_text('{"version": 1, "written_by": "0.1.0"}')
    write_interventions(run, Interventions())
    mark(root / "step_00000001", healthy=True, judged_at=2)
    monkeypatch.setattr(disk.time, "sleep", lambda seconds: None)
    left = [2]

    def stumbling(call: Callable[..., Any]) -> Callable[..., Any]:
        def stumble(path: Any, *rest: Any, **more: Any) -> Any:
            if isinstance(path, str | Path) and Path(path).name == name and left[0]:
                left[0] -= 1
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return call(path, *rest, **more)

        return stumble

    for call in ("open", "stat", "lstat", "listdir", "scandir"):
        monkeypatch.setattr(os, call, stumbling(getattr(os, call)))
    found = store.Shelf(root).candidates()
    assert left == [0]
    assert [(each.step, each.healthy) for each in found] == [(1, True), (2, None)]


def test_waiting_is_bounded_and_said(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(disk.time, "sleep", slept.append)
    path = root / "step_00000002/manifest.json"
    path.rename(root.parent / "away")
    with pytest.raises(Unreadable, match="No such file"):
        read_manifest(path.parent)
    assert slept == list(disk.DELAYS) and sum(slept) < 60
    assert capsys.readouterr().err.count(f"warning: {path}: No such file or directory; trying again in ") == len(slept)
