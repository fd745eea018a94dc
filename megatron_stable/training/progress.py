"""The progress of a run, on the terminal."""

from __future__ import annotations

import sys
import time
from collections import deque
from statistics import median

from megatron_stable.config.schema import Config
from megatron_stable.records.callbacks import Callback
from megatron_stable.records.metrics import Record
from megatron_stable.stability.events import Event


class ProgressLine(Callback):
    """A live line on a terminal; elsewhere a line now and then."""

    SECONDS = 10.0  # between lines where there is no terminal
    RECENT = 50  # records whose pace makes the time left: a stall, or a slow start, is not what comes

    def __init__(self, config: Config) -> None:
        self.steps = config.run.steps
        self.live = sys.stdout.isatty()
        self.width = len(str(self.steps))
        self.last = -self.SECONDS
        self.before: tuple[float, int] | None = None  # time and step of the last record
        self.paces = deque[float](maxlen=self.RECENT)  # seconds per step
        self.shown = False

    def record(self, record: Record) -> None:
        now = time.monotonic()
        if self.before is not None and record["step"] > self.before[1]:
            self.paces.append((now - self.before[0]) / (record["step"] - self.before[1]))
        self.before = now, record["step"]
        ended = record["step"] >= self.steps or "validation_loss" in record
        if not self.live and not ended and now - self.last < self.SECONDS:
            return
        self.last = now
        self._show(self._line(record), keep=not self.live or ended)

    def _line(self, record: Record) -> str:
        step = record["step"]
        parts = [
            f"step {step:{self.width}}/{self.steps}",
            f"loss {_number(record['loss'], '.4f')}",
            f"grad norm {_number(record['grad_norm'], '.3g')}",
        ]
        if "validation_loss" in record:
            parts.insert(2, f"validation {_number(record['validation_loss'], '.4f')}")
        if record["tokens_per_second"] is not None:
            parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
        if record.get("mfu") is not None:
            parts.append(f"MFU {record['mfu']:.1%}")
        if record["skipped"]:
            parts.append("update dropped")
        if self.paces:
            parts.append(f"{duration(median(self.paces) * (self.steps - step))} left")
        return " · ".join(parts)

    def _show(self, line: str, keep: bool) -> None:
        self._print(("\r\x1b[2K" if self.live else "") + line + ("\n" if keep else ""))
        self.shown = not keep

    def rewind(self, step: int) -> None:
        self.before = None

    def event(self, event: Event) -> None:
        self.message(event.sentence())

    def message(self, text: str) -> None:
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


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)
