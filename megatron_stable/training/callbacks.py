"""What watches a run: a callback sees every record and writes it somewhere. Only rank 0 has callbacks."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, ClassVar, Protocol

from megatron_stable.config.schema import Config
from megatron_stable.records.ledger import append_line

Record = dict[str, Any]


class Callback(Protocol):
    """The hooks of a run, in order of their calls."""

    def record(self, record: Record) -> None:
        """After a step that is logged or evaluated; see DESIGN for the keys of ``metrics.jsonl``."""

    def rewind(self, step: int) -> None:
        """After the run went back to a checkpoint of ``step``: records of later steps come anew."""

    def message(self, text: str) -> None:
        """Something to tell the user: a checkpoint, a warning, the end."""

    def close(self) -> None:
        """At the end of the run, however it ends."""


class MetricsFile:
    """``metrics.jsonl``: one object per step; a later line for a step supersedes an earlier one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def record(self, record: Record) -> None:
        append_line(self.path, record)

    def rewind(self, step: int) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoard:
    """Event files under ``tensorboard/``, with a custom-scalars layout as a dashboard.

    Args:
        first_step: The step to begin with; what an earlier process wrote from there on is superseded.
    """

    TAGS: ClassVar = {
        "loss": "train/loss",
        "z_loss": "train/z_loss",
        "mu_loss": "train/mu_loss",
        "grad_norm": "train/grad_norm",
        "learning_rate": "train/learning_rate",
        "loss_scale": "train/loss_scale",
        "tokens_per_second": "train/tokens_per_second",
        "mfu": "train/mfu",
        "data_step": "train/data_step",
        "validation_loss": "validation/loss",
        "validation_perplexity": "validation/perplexity",
        "loss_score": "guard/loss_score",
        "grad_norm_score": "guard/grad_norm_score",
        "skipped": "guard/dropped",
    }

    def __init__(self, directory: Path, first_step: int) -> None:
        self.directory, self.first_step = directory, first_step
        self.writer: Any = None
        self._open()

    def _open(self) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # takes a second, and only rank 0 needs it

        self.writer = SummaryWriter(str(self.directory), purge_step=self.first_step)
        charts = {
            "loss": ["Multiline", ["train/loss", "validation/loss"]],
            "gradient norm": ["Multiline", ["train/grad_norm"]],
            "z-loss": ["Multiline", ["train/z_loss"]],
            "learning rate": ["Multiline", ["train/learning_rate"]],
            "data step": ["Multiline", ["train/data_step"]],
            "guard": ["Multiline", ["guard/loss_score", "guard/grad_norm_score", "guard/dropped"]],
        }
        self.writer.add_custom_scalars({"stability": charts})

    def record(self, record: Record) -> None:
        try:
            if self.writer is None:
                self._open()
            for key, tag in self.TAGS.items():
                if record.get(key) is not None:
                    self.writer.add_scalar(tag, record[key], record["step"])
        except OSError:
            # it does not recover: the next record begins a file of its own
            self.writer, self.first_step = None, record["step"]
            raise

    def rewind(self, step: int) -> None:
        self.first_step = step + 1
        try:
            self.close()
        finally:
            self.writer = None  # the next record begins a file that supersedes what follows the checkpoint

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class ProgressLine:
    """A live line on a terminal; elsewhere a line now and then."""

    SECONDS = 10.0  # between lines where there is no terminal

    def __init__(self, config: Config) -> None:
        self.steps = config.run.steps
        self.live = sys.stdout.isatty()
        self.width = len(str(self.steps))
        self.last = -self.SECONDS
        self.began: tuple[float, int] | None = None
        self.shown = False

    def record(self, record: Record) -> None:
        now = time.monotonic()
        if self.began is None:
            self.began = (now, record["step"])
        ended = record["step"] >= self.steps or "validation_loss" in record
        if not self.live and not ended and now - self.last < self.SECONDS:
            return
        self.last = now
        self._show(self._line(record, now), keep=not self.live or ended)

    def _line(self, record: Record, now: float) -> str:
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
        assert self.began is not None
        if step > self.began[1]:
            seconds = (now - self.began[0]) / (step - self.began[1]) * (self.steps - step)
            parts.append(f"{duration(seconds)} left")
        return " · ".join(parts)

    def _show(self, line: str, keep: bool) -> None:
        self._print(("\r\x1b[2K" if self.live else "") + line + ("\n" if keep else ""))
        self.shown = not keep

    def rewind(self, step: int) -> None:
        self.began = None

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


class Callbacks:
    """Several callbacks as one, of which none can stop the run: what cannot be written is reported once."""

    def __init__(self, *callbacks: Callback) -> None:
        self.callbacks = callbacks
        self.failed: set[Callback] = set()

    def record(self, record: Record) -> None:
        for callback in self.callbacks:
            try:
                callback.record(record)
                self.failed.discard(callback)
            except OSError as error:
                if callback not in self.failed:
                    self.failed.add(callback)
                    self.message(f"warning: {type(callback).__name__} cannot write, training goes on: {error}")

    def rewind(self, step: int) -> None:
        for callback in self.callbacks:
            try:
                callback.rewind(step)
            except OSError as error:
                self.message(f"warning: {type(callback).__name__} cannot write, training goes on: {error}")

    def message(self, text: str) -> None:
        for callback in self.callbacks:
            callback.message(text)

    def close(self) -> None:
        for callback in self.callbacks:
            try:
                callback.close()
            except OSError as error:
                print(f"warning: {type(callback).__name__}: {error}", file=sys.stderr)


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def strict(value: float) -> float | None:
    """A number that JSON has: ``None`` for NaN and infinities."""
    return value if json.dumps(value) not in ("NaN", "Infinity", "-Infinity") else None
