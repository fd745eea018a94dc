"""The progress of a run, on the terminal."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from statistics import median
from typing import NamedTuple

from megatron_stable.config.schema import Config
from megatron_stable.records.callbacks import Callback
from megatron_stable.records.metrics import Record
from megatron_stable.stability.events import Event

SEPARATOR = " · "


class Part(NamedTuple):
    """A part of the line; where there is no room, that of the highest ``rank`` goes first, of several the last."""

    text: str
    rank: int


class ProgressLine(Callback):
    """A live line on a terminal, as wide as that is; elsewhere a line now and then; none where the run is quiet."""

    SECONDS = 10.0  # between lines where there is no terminal
    RECENT = 50  # records whose pace makes the time left: a stall, or a slow start, is not what comes

    def __init__(self, config: Config) -> None:
        self.steps = config.run.steps
        self.quiet = config.logging.verbosity == "quiet"
        self.live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.width = len(str(self.steps))
        self.last = -self.SECONDS
        self.before: tuple[float, int] | None = None  # time and step of the last record
        self.paces = deque[float](maxlen=self.RECENT)  # seconds per step
        self.shown = False
        self.latest: Event | None = None

    def record(self, record: Record) -> None:
        now = time.monotonic()
        if self.before is not None and record["step"] > self.before[1]:
            self.paces.append((now - self.before[0]) / (record["step"] - self.before[1]))
        self.before = now, record["step"]
        ended = record["step"] >= self.steps or "validation_loss" in record
        if self.quiet or (not self.live and not ended and now - self.last < self.SECONDS):
            return
        self.last = now
        parts = self._parts(record)
        if self.live and not ended:
            self._show(fitted(parts, _columns()), keep=False)
        else:
            self._show(SEPARATOR.join(part.text for part in parts), keep=True)

    def _parts(self, record: Record) -> list[Part]:
        step = record["step"]
        parts = [
            Part(f"step {step:{self.width}}/{self.steps}", 0),
            Part(f"loss {_number(record['loss'], '.4f')}", 0),
        ]
        if "validation_loss" in record:
            parts.append(Part(f"validation {_number(record['validation_loss'], '.4f')}", 1))
        parts.append(Part(f"grad norm {_number(record['grad_norm'], '.3g')}", 3))
        pace = median(self.paces) if self.paces else 0.0  # 0: not known
        if pace:
            parts.append(Part(f"{pace:.3g} s/step" if pace >= 1 else f"{1 / pace:.3g} steps/s", 7))
        if record["tokens_per_second"] is not None:
            parts.append(Part(f"{record['tokens_per_second']:,.0f} tokens/s", 5))
        if record.get("mfu") is not None:
            parts.append(Part(f"MFU {record['mfu']:.1%}", 6))
        if record["skipped"]:
            parts.append(Part("update dropped", 1))
        if pace:
            parts.append(Part(f"{duration(pace * (self.steps - step))} left", 2))
        if self.live and self.latest is not None:
            parts.append(Part(f"{self.latest.event.replace('_', ' ')} at {self.latest.step:,}", 4))
        return parts

    def _show(self, line: str, keep: bool) -> None:
        self._print(("\r\x1b[2K" if self.live else "") + line + ("\n" if keep else ""))
        self.shown = not keep

    def rewind(self, step: int) -> None:
        self.before = None

    def event(self, event: Event) -> None:
        self.latest = event
        self._tell(event.sentence())

    def message(self, text: str) -> None:
        if not self.quiet or text.startswith("warning"):
            self._tell(text)

    def ended(self, text: str) -> None:
        self._tell(text)

    def _tell(self, text: str) -> None:
        self.close()
        self._print(f"{text}\n")

    def close(self) -> None:
        if self.shown:
            self.shown = False
            self._print("\n")

    @staticmethod
    def _print(text: str) -> None:
        try:
            print(text, end="", flush=True)
        except OSError:  # nobody reads it any more: a closed pipe, a terminal that is gone
            return


def fitted(parts: list[Part], columns: int) -> str:
    """As many of the parts as there is room for on one line; 0 columns: nobody knows how many there are."""
    kept = [*parts]
    while columns and len(kept) > 1 and len(SEPARATOR.join(part.text for part in kept)) >= columns:
        kept.remove(max(reversed(kept), key=lambda part: part.rank))
    line = SEPARATOR.join(part.text for part in kept)
    return line if not columns or len(line) < columns else line[: columns - 1]  # in the last column it would wrap


def _columns() -> int:
    """Of the terminal, as it is now."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        return 0


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)
