"""The progress line, whatever becomes of the numbers and the terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import sys
import termios
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_stable.config.schema import Config
from megatron_stable.records.callbacks import Callbacks
from megatron_stable.stability.events import Spike
from megatron_stable.training.progress import Part, ProgressLine, duration, fitted

RECORD: dict[str, Any] = {"step": 1, "loss": 2.5, "grad_norm": 0.5, "tokens_per_second": None, "skipped": False}


def test_a_diverged_run_still_has_a_progress_line(capsys: pytest.CaptureFixture[str]) -> None:
    record = {**RECORD, "loss": None, "grad_norm": None, "validation_loss": None, "skipped": True}
    ProgressLine(Config()).record(record)
    line = capsys.readouterr().out
    assert "loss not finite · validation not finite · grad norm not finite · update dropped" in line


def test_nobody_needs_to_read_the_progress_line(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w", closefd=False))
    line = ProgressLine(Config())
    line.record(RECORD)
    line.message("done")
    line.close()
    monkeypatch.undo()
    os.close(write)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3599.9, "1:00:00"), (90061, "25:01:01")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_stall_does_not_count_for_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line, now = ProgressLine(Config.model_validate({"run": {"steps": 200}})), 0.0
    for step in range(1, 101):
        now += 75.0 if step == 60 else 2.0
        monkeypatch.setattr("time.monotonic", lambda now=now: now)
        line.record({**RECORD, "step": step})
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .endswith("step 100/200 · loss 2.5000 · grad norm 0.5 · 2 s/step · 3:20 left")
    )


# --- on a terminal, of any width ---

SPIKE = Spike(step=1234, series="loss", value=9, level=2, scale=0.1, score=70, onset=1234)
FULL = {"tokens_per_second": 345_678.0, "mfu": 0.451}


class Terminal:
    """A pseudo-terminal as stdout, and what was written to it."""

    def __init__(self) -> None:
        self.ours, self.theirs = pty.openpty()
        attributes = termios.tcgetattr(self.theirs)
        attributes[1] &= ~termios.OPOST  # newlines as they are
        termios.tcsetattr(self.theirs, termios.TCSANOW, attributes)
        self.file = os.fdopen(self.theirs, "w", closefd=False)

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def read(self) -> str:
        """All that was written since the last call; it comes in pieces."""
        self.file.write("\0")
        self.file.flush()
        found = b""
        while not found.endswith(b"\0"):
            found += os.read(self.ours, 65536)
        return found[:-1].decode()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """To be attached in the test itself: pytest takes stdout back after a fixture."""
    opened = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    yield opened
    monkeypatch.undo()
    for end in (opened.ours, opened.theirs):
        os.close(end)


def begun(config: Config, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> ProgressLine:
    """A line that knows its pace: 1.5 s a step, on a terminal."""
    monkeypatch.setattr(sys, "stdout", terminal.file)
    line = ProgressLine(config)
    for step in (1235, 1236):
        monkeypatch.setattr("time.monotonic", lambda now=1.5 * step: now)
        line.record({**RECORD, "step": step})
    return line


CONFIG = Config.model_validate({"run": {"steps": 10_000}})


def test_the_live_line_fits_the_terminal_as_it_is_now(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    line = begun(CONFIG, terminal, monkeypatch)
    line.event(SPIKE)
    terminal.read()
    seen = []
    for columns in (200, 80, 30, 12):
        terminal.resize(columns)
        line.record({**RECORD, **FULL, "step": 1236})
        seen.append(terminal.read().removeprefix("\r\x1b[2K"))
        assert len(seen[-1]) < columns
    assert seen == [
        "step  1236/10000 · loss 2.5000 · grad norm 0.5 · 1.5 s/step · 345,678 tokens/s · MFU 45.1% · 3:39:06 left · "
        "spike at 1,234",
        "step  1236/10000 · loss 2.5000 · grad norm 0.5 · 3:39:06 left · spike at 1,234",
        "step  1236/10000",
        "step  1236/",
    ]


def test_what_fits_is_kept_in_its_order() -> None:
    parts = [Part("aaaa", 0), Part("bbbb", 3), Part("cccc", 1)]
    assert [fitted(parts, columns) for columns in (0, 19, 18, 12, 11, 4)] == [
        "aaaa · bbbb · cccc", "aaaa · bbbb · cccc", "aaaa · cccc", "aaaa · cccc", "aaaa", "aaa",
    ]  # fmt: skip


def test_an_event_begins_a_line_of_its_own(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    line = begun(CONFIG, terminal, monkeypatch)
    terminal.read()
    line.event(SPIKE)
    assert terminal.read() == f"\n{SPIKE.sentence()}\n"


def test_a_dumb_terminal_is_none(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    begun(CONFIG, terminal, monkeypatch)
    assert "\x1b" not in terminal.read()


@pytest.mark.parametrize("verbosity", ["quiet", "normal"])
def test_a_quiet_run_tells_of_events_warnings_and_the_end(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, verbosity: str
) -> None:
    line = begun(
        Config.model_validate({"logging": {"verbosity": verbosity}, "run": {"steps": 1236}}), terminal, monkeypatch
    )
    told = Callbacks(line)
    told.message("checkpoint complete")
    told.event(SPIKE)
    told.message("warning: slow")
    told.ended("done")
    said = terminal.read()
    wanted = [f"{SPIKE.sentence()}\n", "warning: slow\n", "done\n"]
    if verbosity == "quiet":
        assert said == "".join(wanted)
    else:
        assert all(text in said for text in ("checkpoint complete", "loss 2.5", *wanted))
