"""A sweep as a report shows it: its table, read and put in order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_stable.errors import ConfigError, DataError
from megatron_stable.stability.event import one_line
from megatron_stable.study.sensitivity import Group, groups_of, rates_of
from megatron_stable.study.table import FILE, MEASURED, RATE, TABLE, Row, read_table


@dataclass(frozen=True)
class Sweep:
    """A sweep, finished or in progress.

    Attributes:
        rates: Its learning rates, rising.
        probes: What was measured over time; there need not be such a file.
    """

    name: str
    rows: list[Row]
    groups: list[Group]
    rates: list[float]
    probes: Path


def is_sweep(path: Path) -> bool:
    """Whether a path is a sweep's directory, or a table."""
    return path.suffix in (".csv", ".parquet") or any((path / name).exists() for name in (FILE, f"{TABLE}.parquet"))


def open_sweep(path: Path) -> Sweep:
    """Read a sweep's directory, or a table.

    Raises:
        ConfigError: It is none.
        DataError: No run has been recorded yet, or it cannot be read.
    """
    if path.is_dir() and not (path / f"{TABLE}.parquet").exists():
        raise DataError(f"{path} has no table yet: report it once a run of the sweep has ended")
    rows, directory = read_table(path), path if path.is_dir() else path.parent
    if not rows:
        raise DataError(f"the table of {path} has no run yet: there is nothing to report")
    for row in rows:
        if not isinstance(row[RATE], (int, float)) or not row[RATE] > 0:
            raise ConfigError(f"{path}: {RATE} of the run {row['name']} is {row[RATE]}: it must be a positive number")
        if not isinstance(row["score"], (int, float, type(None))):
            raise ConfigError(
                f"{path}: score of the run {row['name']} is {row['score']!r}: it must be a number, or empty"
            )
    return Sweep(one_line(directory.resolve().name), rows, groups_of(rows), rates_of(rows), directory / MEASURED)
