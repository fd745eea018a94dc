"""Which steps are measured inside the model, and what becomes of it: with the records, and when trouble begins."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_stable.config.schema import LoggingConfig
from megatron_stable.engine.engine import Engine
from megatron_stable.records.callbacks import Callbacks
from megatron_stable.records.flight import FLIGHT, flight_file
from megatron_stable.records.metrics import Record
from megatron_stable.stability.events import Divergence, Drop, Event, FlightRecorded, LossScaleFloor, Rise, Spike

CLOSE = 50  # steps that are measured after the last sign of trouble, and after going back
SUSPICIOUS = (Spike, Rise, Divergence, Drop, LossScaleFloor)


class Probing:
    """The probes of a run in progress. Collective: every rank has one, calls its methods, and decides alike.

    Args:
        callbacks: Take what the flight recorder has when trouble begins.
    """

    def __init__(self, logging: LoggingConfig, engine: Engine, callbacks: Callbacks) -> None:
        self.engine, self.callbacks = engine, callbacks
        self.every, self.size = logging.probes_every, logging.flight_recorder
        self.flights = logging.flight_every if self.size else 0
        self.until = 0  # up to this step, each one is measured
        self.trouble = 0  # up to this step, what happens is part of trouble whose beginning was handed out
        self.recorded = False  # whether the last step's measurements go into its record
        self.histograms_every = logging.histograms_every if logging.probes_every else 0

    def begin(self, step: int) -> bool:
        """Whether a step that begins is measured."""
        self.recorded = self.every > 0 and (step % self.every == 0 or step <= self.until)
        return self.recorded or (self.every > 0 and self.flights > 0 and step % self.flights == 0)

    def histograms(self, step: int) -> bool:
        """Whether a step makes histograms."""
        return self.histograms_every > 0 and step % self.histograms_every == 0

    def record(self) -> Record:
        """What the last step's record says of it, on rank 0."""
        return self.engine.probes.last() if self.engine.probes is not None and self.recorded else {}

    def hand_out(self, step: int) -> None:
        """After a step: its histograms, if it made any."""
        if self.engine.probes is not None and self.histograms(step):
            self.callbacks.histograms(step, self.engine.probes.histograms())

    def review(self, step: int, data_step: int, events: Iterable[Event]) -> None:
        """After a step in which this happened: when trouble begins, hand out the steps before it, and look closely."""
        if self.engine.probes is None or not any(isinstance(event, SUSPICIOUS) for event in events):
            return
        begins, self.trouble, self.until = step > self.trouble, step + CLOSE, step + CLOSE
        if not begins or not self.size:
            return
        rows = self.engine.probes.flight()
        if rows:
            self.callbacks.flight(step, rows)
            file, first, last = f"{FLIGHT}/{flight_file(step)}", rows[0][0], rows[-1][0]
            self.callbacks.event(FlightRecorded(step=step, data_step=data_step, file=file, first=first, last=last))

    def rewind(self, step: int) -> None:
        """The run has gone back to a checkpoint of this step: what comes now is looked at closely, too."""
        if self.engine.probes is not None:
            self.engine.probes.forget()
        self.trouble, self.until = 0, step + CLOSE
