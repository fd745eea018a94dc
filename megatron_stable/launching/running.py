"""Run a launcher's command until its ranks have ended, and have the run stop in order when a signal comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from megatron_stable.errors import MegatronStableError
from megatron_stable.launching.local import OWN_GROUP
from megatron_stable.records.directory import RunDirectory
from megatron_stable.records.owner import OWNER, Owner, read_owner
from megatron_stable.records.presence import ask_to_stop
from megatron_stable.stability.events import Event, Stop
from megatron_stable.training.hangup import drop_dead_streams
from megatron_stable.training.stop import SIGNALS

LOOK = 0.5  # seconds between looks for signals


def run(command: Sequence[str], environment: Mapping[str, str], file: str, directory: Path, on_hangup: str) -> int:
    """Returns the exit code.

    The first signal asks the run to stop, as ``megatron-stable stop`` does: all ranks finish their step and save,
    however long that takes, and end with code 0. Launchers would end them in a hurry. One more ends the launcher.

    Args:
        environment: Added to this process's.
        file: Text of the file that DS_ENV_FILE names, for DeepSpeed's launcher.
        directory: The run's.
        on_hangup: The run's setting: with "continue" a terminal that is closed is no reason to stop.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)

    caught = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    if on_hangup == "continue" and signal.SIGHUP in caught:
        caught.remove(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before = {number: signal.signal(number, receive) for number in caught}
    earlier, known = _owner(directory), len(_events(directory))
    with tempfile.NamedTemporaryFile("w", prefix="megatron-stable-", suffix=".env") as passed:
        passed.write(file)
        passed.flush()
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment, "DS_ENV_FILE": passed.name},
            stdin=subprocess.DEVNULL,
            **OWN_GROUP,
        )
        try:
            code, passed_on = _await(process, received, directory, earlier)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)
    return _explained(code, directory, known, passed_on)


def _await(
    process: subprocess.Popen[bytes], received: list[int], directory: Path, earlier: Owner | None
) -> tuple[int, bool]:
    """(exit code, whether the launcher was told to end)"""
    done, passed_on = 0, False
    while True:
        try:
            return process.wait(LOOK), passed_on
        except subprocess.TimeoutExpired:
            pass
        if len(received) == done:
            continue
        done += 1
        name = signal.Signals(received[done - 1]).name
        drop_dead_streams()
        owner = _owner(directory)
        began = owner is not None and (earlier is None or owner.token != earlier.token)
        if began and done == 1 and _asked(directory, owner, name):
            _tell(f"{name}: the run stops after the step in progress and saves; once more to end it at once")
            continue
        passed_on = True
        _tell(f"{name}: ending the launcher")
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)


def _asked(directory: Path, owner: Owner | None, name: str) -> bool:
    try:
        assert owner is not None
        ask_to_stop(directory, owner, f"{name} to `megatron-stable launch`", save=True)
    except MegatronStableError as error:
        _tell(f"warning: the run cannot be asked to stop: {error}")
        return False
    return True


def _owner(directory: Path) -> Owner | None:
    try:
        return read_owner(directory / OWNER)
    except MegatronStableError:
        return None


def _explained(code: int, directory: Path, known: int, passed_on: bool) -> int:
    """The exit code. What the run has put on record counts for more than what a launcher makes of its ranks' codes:
    srun takes the greatest, and DeepSpeed's says 0 where pdsh was killed."""
    if passed_on:
        _tell(f"the launcher was ended; `megatron-stable status {directory}` says how far the run is")
        return 130
    ends = [event.exit_code for event in _events(directory)[known:] if isinstance(event, Stop)]
    if ends or code in range(6):
        return ends[-1] if ends else code
    _tell(
        f"error: the launcher ended with {code}; its output above says why; the same command goes on from the last "
        "checkpoint"
    )
    return 1


def _events(directory: Path) -> list[Event]:
    try:
        return list(RunDirectory(directory).ledger.read())
    except MegatronStableError:
        return []


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
