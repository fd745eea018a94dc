"""A run's metrics and events as TensorBoard shows them."""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_stable.config.schema import Config
from megatron_stable.model.probes import LOWEST
from megatron_stable.records.callbacks import Callback
from megatron_stable.records.dashboard import layout
from megatron_stable.records.metrics import Record
from megatron_stable.records.tags import markers, scalars
from megatron_stable.stability.events import Event


class TensorBoard(Callback):
    """Event files under ``tensorboard/``, with a custom-scalars layout as a dashboard.

    All numbers of a record are one entry of the file: a model of 48 layers has thousands, and one by one, as
    ``add_scalar`` writes them, they take ten times as long (benchmarks/board.py).

    An event is a pulse of a scalar, ``events/spike``, and its sentence in the text of the same tag. It stands at its
    step; where the run went back behind that, at the first step anew: TensorBoard hides what was written from there on.

    Args:
        first_step: The step to begin with; what an earlier process wrote from there on is superseded.
        config: The run, whose probes the layout shows.
    """

    def __init__(self, directory: Path, first_step: int, config: Config) -> None:
        self.directory, self.first_step, self.config = directory, first_step, config
        self.writer: Any = None
        self.last = first_step - 1  # the step of the last record
        self.pending: list[Event] = []  # to be written with the next record
        self.told = deque[tuple[int, Event]](maxlen=1000)  # written, and at which step
        self.pulsing: set[str] = set()  # tags of markers that have been written
        self._open()

    def event(self, event: Event) -> None:
        self.pending.append(event)

    def record(self, record: Record) -> None:
        step = record["step"]
        with self._writing(step):
            self._write_pending(step, scalars(record))
        self.last = step

    def histograms(self, step: int, counts: Mapping[str, Sequence[float]]) -> None:
        """By the logarithm of the magnitude to base 2: in itself, all but the largest few would be one bar."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        drawn = [Summary.Value(tag=tag, histo=_histogram(of)) for tag, of in counts.items() if any(of)]
        with self._writing(step):
            self._add(step, summary=Summary(value=drawn))

    def rewind(self, step: int) -> None:
        self.pending[:0] = [event for at, event in self.told if at > step]
        self.told = deque(((at, event) for at, event in self.told if at <= step), self.told.maxlen)
        self.first_step, self.last = step + 1, step
        try:
            self._close()
        finally:
            self.writer = None  # the next record begins a file that supersedes what follows the checkpoint

    def close(self) -> None:
        if self.pending:
            end = max(self.last, *(event.step for event in self.pending))
            with self._writing(end):
                self._write_pending(end, {})
        self._close()

    def _close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _open(self) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog  # takes a second, and only rank 0 needs it
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.writer = EventFileWriter(str(self.directory))
        self._add(self.first_step, session_log=SessionLog(status=SessionLog.START))
        self._add(0, summary=layout(self.config.logging))

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

    def _write_pending(self, step: int, values: Mapping[str, float]) -> None:
        """Write the events that wait, each at its step unless that is past, and the values of ``step``."""
        waiting = defaultdict[int, list[Event]](list, {step: []})
        for event in self.pending:
            waiting[min(max(event.step, self.last), step)].append(event)
        for at, events in sorted(waiting.items()):
            self._write(at, events, {**dict.fromkeys(self.pulsing, 0.0), **values} if at == step else {})
        self.told += [(at, event) for at, events in waiting.items() for event in events]
        self.pending = []

    def _write(self, step: int, events: Sequence[Event], values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard.summary import text

        pulses = Counter(tag for event in events for tag in markers(event))
        if new := pulses.keys() - self.pulsing:
            self._add(self.last, summary=Summary(value=[Summary.Value(tag=tag, simple_value=0.0) for tag in new]))
            self.pulsing |= new
        sentences = defaultdict[str, list[str]](list)
        for event in events:
            sentences[markers(event)[0]].append(event.sentence())
        summary = Summary(
            value=[Summary.Value(tag=tag, simple_value=value) for tag, value in {**values, **pulses}.items()]
        )
        for tag, lines in sentences.items():
            summary.MergeFrom(text(tag, "\n\n".join(lines)))
        self._add(step, summary=summary)

    def _add(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Entry

        self.writer.add_event(Entry(step=step, wall_time=time.time(), **content))


def _histogram(counts: Sequence[float]) -> Any:
    """Counts of the powers of two, without the empty ones at both ends."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto

    held = [i for i, count in enumerate(counts) if count]
    first, end = held[0], held[-1] + 1
    return HistogramProto(
        min=LOWEST + first,
        max=LOWEST + end,
        num=sum(counts),
        bucket_limit=[LOWEST + i for i in range(first + 1, end + 1)],
        bucket=counts[first:end],
    )
