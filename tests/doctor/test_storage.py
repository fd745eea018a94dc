"""The file system is tried for real: shared or not, full or not writable, with locks, and one that hangs."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_stable.config.schema import Config
from megatron_stable.doctor import storage
from megatron_stable.doctor.bounded import Late, within
from megatron_stable.doctor.finding import Finding, Verdict
from megatron_stable.doctor.storage import Storage, check_storage, kind_of
from tests.doctor.rounds import crew
from tests.harness.ranks import Ranks

CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x00020000, 0x4000, 1 << 18


def on_rank(hosts: tuple[str, ...], directory: Path, config: dict[str, Any] | None = None) -> list[Finding]:
    storage.SEEN = 2.0
    return check_storage(crew(hosts, directory, Config.model_validate(config) if config is not None else None))


def verdicts(found: list[Finding]) -> dict[str, Verdict]:
    return {finding.check: finding.verdict for finding in found}


def test_one_machine(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks.run(2, on_rank, ("a", "a"), tmp_path / "not/there/yet")
    assert second == []
    assert verdicts(first) == dict.fromkeys(("storage", "writing", "locks", "renaming"), Verdict.OK)
    texts = {finding.check: finding for finding in first}
    assert texts["locks"].text == "flock keeps others out"
    assert texts["storage"].text.startswith(f"{tmp_path} is on {kind_of(tmp_path)}")
    assert texts["writing"].numbers["rate"] > 0.1
    assert texts["renaming"].numbers["reads"] > 10
    assert [*tmp_path.iterdir()] == []


def test_two_machines_that_share_it(ranks: Ranks, tmp_path: Path) -> None:
    first, _, second = ranks.run(3, on_rank, ("a", "a", "b"), tmp_path)
    assert verdicts(first) == dict.fromkeys(("storage", "writing", "locks", "renaming"), Verdict.OK)
    assert verdicts(second) == {**verdicts(first), "shared storage": Verdict.OK}
    seen = next(finding for finding in second if finding.check == "shared storage")
    assert 0 <= seen.numbers["seconds"] < 2.0
    assert [*tmp_path.iterdir()] == []


def on_rank_with_its_own_disk(hosts: tuple[str, ...], directory: Path) -> list[Finding] | None:
    """Rank 1 has another file system mounted there, in a mount namespace of its own; ``None``: that is not allowed."""
    allowed = True
    if dist.get_rank() == 1:
        libc = ctypes.CDLL(None, use_errno=True)
        allowed = not (
            libc.unshare(CLONE_NEWNS)
            or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
            or libc.mount(b"tmpfs", os.fsencode(directory), b"tmpfs", 0, None)
        )
    answers: list[Any] = [None, None]
    dist.all_gather_object(answers, allowed)
    return on_rank(hosts, directory) if all(answers) else None


def test_two_machines_with_disks_of_their_own(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks.run(2, on_rank_with_its_own_disk, ("a", "b"), tmp_path)
    if first is None or second is None:
        pytest.skip("mounting needs root")
    assert verdicts(first)["locks"] is Verdict.OK
    (own,) = [finding for finding in second if finding.check == "shared storage"]
    assert own.verdict is Verdict.FAILURE and own.text.startswith("not the same as rank 0's")
    assert "locks" not in verdicts(second)
    assert [*tmp_path.iterdir()] == []


def test_a_directory_that_cannot_be_written_to(ranks: Ranks) -> None:
    """sysfs takes no folders, not even from root."""
    (found,) = ranks.run(1, on_rank, ("a",), Path("/sys/kernel/run"))
    (finding,) = found
    assert finding.verdict is Verdict.FAILURE
    assert finding.text.startswith("make a folder for /sys/kernel/run: ")


def test_room_for_checkpoints(ranks: Ranks, tmp_path: Path) -> None:
    small = {"model": {"vocab_size": 1000}}
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    layers = free // (12 * 12 * 4096**2)  # a checkpoint about as large as what is free: 12 h^2 parameters a block
    large = {"model": {"size": None, "vocab_size": 1000, "hidden": 4096, "heads": 32, "layers": int(layers) + 1}}
    for values, expected in ((small, Verdict.OK), (large, Verdict.FAILURE)):
        (found,) = ranks.run(1, on_rank, ("a",), tmp_path, values)
        assert verdicts(found)["storage"] is expected
    assert "a checkpoint takes" in found[0].text and found[0].remedy.startswith("make room")


def test_a_file_system_that_hangs_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe without a writer hangs in open(), as a file of a dead server does."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(Late, match=r"no answer within 0.2 s"):
        within(0.2, pipe.read_bytes)
    monkeypatch.setattr(storage, "LIMIT", 0.3)
    here = storage.Crew(0, ("a",), torch.device("cpu"), None, tmp_path)
    own, start = Storage(here), time.monotonic()
    assert own.step("read", pipe.read_bytes) is None
    assert own.step("write", lambda: 1) is None  # no further steps are taken
    assert time.monotonic() - start < 5.0
    (finding,) = own.findings
    assert (finding.verdict, finding.text) == (Verdict.FAILURE, "read: no answer within 0.3 s")


def test_what_fails_within_time_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        within(5.0, lambda: 1 / 0)
