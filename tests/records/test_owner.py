"""A run's directory has one owner, on one machine or on several that see no lock of each other."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from megatron_stable import disk
from megatron_stable.errors import ConfigError
from megatron_stable.records import owner
from megatron_stable.records.owner import LOCK, OWNER, Claim
from tests.training.runs import ROOT

HOLD = """
import sys, time
from pathlib import Path
from megatron_stable.records import owner
owner.BEAT = 0.05
if sys.argv[2]:
    owner.socket.gethostname = owner.machine = lambda: sys.argv[2]
claim = owner.Claim(Path(sys.argv[1]), owner.end_at_once)
claim.take()
print("ready", flush=True)
sys.stdin.read()
claim.release()
"""
Hold = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """Starts another process that owns the directory, on this machine ("") or, as far as anybody can tell, another."""
    started: list[subprocess.Popen[str]] = []

    def start(host: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(tmp_path), host]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        holder = subprocess.Popen(command, cwd=ROOT, text=True, env={**os.environ, "SLURM_JOB_ID": "4711"}, **pipes)
        started.append(holder)
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        if host:
            (tmp_path / LOCK).unlink()  # what is locked there is nothing here
        return holder

    yield start
    for holder in started:
        holder.kill()
        holder.communicate()


@pytest.fixture
def claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Claim]:
    """Of this process, not taken yet."""
    monkeypatch.setattr(owner, "PATIENCE", 2.0)
    mine = Claim(tmp_path, lambda text: None)
    yield mine
    mine.release()


def test_a_run_that_lives_on_another_machine_is_left_alone(hold: Hold, claim: Claim, tmp_path: Path) -> None:
    holder = hold("node7")
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        claim.take()
    assert caught.value.exit_code == 2
    assert f"in use by a run that has not ended, process {holder.pid} on node7, job 4711: " in str(caught.value)
    assert f"delete {tmp_path / OWNER}" in str(caught.value)
    assert time.monotonic() - began < 2.0, "to see it count is enough"
    claim.release()
    assert json.loads((tmp_path / OWNER).read_text())["pid"] == holder.pid


def test_one_that_has_died_there_is_taken_over_and_if_it_has_not_it_ends(
    hold: Hold, claim: Claim, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine that is cut off for longer than others wait must not come back as a second writer."""
    holder = hold("node7")
    holder.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    claim.take()
    assert time.monotonic() - began >= 2.0
    assert f"over from process {holder.pid} on node7, job 4711, which ended without a word" in capsys.readouterr().err
    assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()
    holder.send_signal(signal.SIGCONT)
    assert holder.wait(timeout=30) == 5  # by itself, before it is told to leave
    _, said = holder.communicate(timeout=30)
    assert f"was taken over by process {os.getpid()} on " in said
    assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()


def test_one_that_leaves_while_somebody_waits(hold: Hold, claim: Claim, tmp_path: Path) -> None:
    holder = hold("node7")
    holder.communicate("", timeout=30)
    assert not (tmp_path / OWNER).exists()
    claim.take()
    claim.release()
    assert {path.name for path in tmp_path.iterdir()} == {LOCK}


def test_on_one_machine_the_lock_decides_at_once(
    hold: Hold, claim: Claim, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = hold("")
    with pytest.raises(ConfigError, match=f"not ended, process {holder.pid} on "):
        claim.take()
    holder.kill()
    holder.wait()
    monkeypatch.setattr(owner.time, "sleep", lambda seconds: pytest.fail("it need not wait"))
    claim.take()
    assert f"over from process {holder.pid} on " in capsys.readouterr().err


def test_without_locks_the_process_decides(hold: Hold, claim: Claim, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(owner.fcntl, "flock", flock)
    holder = hold("")
    with pytest.raises(ConfigError, match=f"not ended, process {holder.pid} on "):
        claim.take()
    holder.kill()
    holder.wait()
    claim.take()


def test_a_lock_that_outlives_its_machine_is_waited_for(
    hold: Hold, claim: Claim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As file servers keep it for a while."""
    monkeypatch.setattr(owner, "LEASE", 20.0)
    holder = hold("")
    holder.send_signal(signal.SIGSTOP)
    written = json.loads((tmp_path / OWNER).read_text())
    (tmp_path / OWNER).write_text(json.dumps({**written, "host": "node7", "machine": "node7"}))
    threading.Timer(4.0, holder.kill).start()
    began = time.monotonic()
    claim.take()
    assert time.monotonic() - began >= 3.5
    assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()


def test_a_file_system_that_stumbles_is_asked_again(
    hold: Hold, claim: Claim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stale handle is not an owner that has left."""
    holder = hold("node7")
    opened, stumbles = disk.open_plain, iter([True, True])

    def stale(path: Path) -> BinaryIO:
        if next(stumbles, False):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return opened(path)

    monkeypatch.setattr(owner, "open_plain", stale)
    with pytest.raises(ConfigError, match=f"process {holder.pid} on node7"):
        claim.take()


def test_a_run_that_was_replaced_ends_although_nobody_can_be_told() -> None:
    code = "from megatron_stable.records.owner import end_at_once; end_at_once('taken over')"
    with Path("/dev/full").open("w") as full:
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=full, timeout=60).returncode == 5


def test_it_counts_while_it_lives(claim: Claim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "BEAT", 0.02)
    claim.take()
    time.sleep(0.5)
    found = json.loads((tmp_path / OWNER).read_text())
    assert found["beats"] > 2
    assert (found["pid"], found["machine"]) == (os.getpid(), owner.machine())


def test_what_is_no_owner_is_none(claim: Claim, tmp_path: Path) -> None:
    (tmp_path / OWNER).write_text("{")
    claim.take()
    assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()
