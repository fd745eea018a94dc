"""A run's metrics and events as TensorBoard shows them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from megatron_stable.records.callbacks import Callback
from megatron_stable.records.metrics import Record
from megatron_stable.stability.events import Event


class TensorBoard(Callback):
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

    def event(self, event: Event) -> None:
        with self._writing(event.step):
            self.writer.add_text("events", event.sentence(), event.step)

    def record(self, record: Record) -> None:
        with self._writing(record["step"]):
            for key, tag in self.TAGS.items():
                if record.get(key) is not None:
                    self.writer.add_scalar(tag, record[key], record["step"])

    @contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            if self.writer is None:
                self._open()
            yield
        except OSError:
            # it does not recover: what comes next begins a file of its own
            self.writer, self.first_step = None, step
            raise

    def rewind(self, step: int) -> None:
        self.first_step = step + 1
        try:
            self.close()
        finally:
            self.writer = None  # the next record begins a file that supersedes what follows the checkpoint

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
