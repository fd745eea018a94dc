"""A run as a report shows it: what its directory says, read once and then again as it grows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from megatron_stable.analysis.flight import Flight, flights
from megatron_stable.analysis.report.reading import Curves
from megatron_stable.config.load import load_config
from megatron_stable.config.schema import Config
from megatron_stable.errors import DataError
from megatron_stable.files import explain_os_errors
from megatron_stable.records.directory import RunDirectory, require_known_format, require_run
from megatron_stable.records.flight import FLIGHT
from megatron_stable.stability.event import one_line
from megatron_stable.stability.events import Event, FlightRecorded


@dataclass
class Run:
    """A run.

    Attributes:
        name: What the report calls it; no other run of the report has it.
        config: As its directory says it ran.
        curves: Its numbers.
        events: Its ledger, oldest first.
        flights: What its flight recorder wrote, oldest first: after a rollback, steps come again.
    """

    name: str
    path: Path
    config: Config
    curves: Curves
    events: list[Event]
    flights: list[Flight]

    def refresh(self) -> bool:
        """Read what has been written since; says whether there was anything. DataError: it cannot be read."""
        before = len(self.events), len(self.flights)
        with explain_os_errors("read", self.path):
            directory = RunDirectory(self.path)
            self.events, self.config = directory.ledger.read(), load_config(directory.config)
        told = [event.file for event in self.events if isinstance(event, FlightRecorded)]
        written = {file: number for number, file in enumerate(told)}
        self.flights = sorted(flights(self.path), key=lambda flight: written.get(f"{FLIGHT}/{flight.path.name}", -1))
        return self.curves.refresh() or before != (len(self.events), len(self.flights))

    @property
    def written(self) -> str:
        """When the last record was, in words."""
        with explain_os_errors("read", self.curves.path):
            at = datetime.fromtimestamp(self.curves.path.stat().st_mtime, timezone.utc)
        return f"{at:%Y-%m-%d %H:%M:%S} UTC"


def open_runs(paths: Sequence[Path], empty: bool = False) -> list[Run]:
    """Runs by their directories.

    Args:
        empty: Whether a run may have recorded nothing yet; then none is read here.

    Raises:
        ConfigError: A path is no run's directory.
        DataError: A run has recorded nothing yet, or cannot be read.
    """
    runs = []
    for path in dict.fromkeys(paths):
        require_run(path)
        require_known_format(path)
        directory = RunDirectory(path)
        run = Run(one_line(path.resolve().name), path, load_config(directory.config), Curves(directory.metrics), [], [])
        if not empty:
            run.refresh()
            if not run.curves.step:
                raise DataError(f"{path} has recorded no step yet: there is nothing to report")
        runs.append(run)
    names = Counter(run.name for run in runs)
    for run in runs:
        if names[run.name] > 1:
            run.name = one_line(str(run.path))
    return runs
