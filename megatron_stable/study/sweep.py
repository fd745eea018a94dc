"""A sweep: its runs, which of them have ended, and the table of all.

All that is known is in the directories of the runs, so a sweep that was killed goes on where it stopped.
"""

from __future__ import annotations

import fcntl
import io
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from megatron_stable.config.load import load_config
from megatron_stable.data import Tokenizer, open_dataset
from megatron_stable.errors import ConfigError, DataError, MegatronStableError
from megatron_stable.files import explain_os_errors, write_file
from megatron_stable.records.directory import RunDirectory, differences
from megatron_stable.study.grid import Cell, Grid
from megatron_stable.study.outcome import ENDED, Measured, outcome, read_ended
from megatron_stable.study.pool import Change, Pool
from megatron_stable.study.table import FILE, MEASURED, Row, write_table
from megatron_stable.training.pretrain import with_vocabulary

EVERY, SHARE = 20.0, 20.0  # seconds between tables, at least, and times as long as one takes


class Part(NamedTuple):
    """Every so many-th run of a sweep: the ``number``-th of ``of`` parts."""

    number: int = 1
    of: int = 1


class Outcome(NamedTuple):
    """What became of a run: its row, and its part of probes.parquet, in columns, as a large sweep has many numbers."""

    row: Row
    measured: Any


class Sweep:
    """The runs of a grid.

    Args:
        part: The runs that this process trains.

    Raises:
        ConfigError, DataError: It cannot be trained; all that is wrong, at once.
    """

    def __init__(self, grid: Grid, part: Part = Part()) -> None:
        self.grid, self.directory = grid, grid.directory
        self.cells = _ready(grid)
        self.mine = self.cells[part.number - 1 :: part.of]
        self._part = part
        self._known: dict[str, Outcome] = {}  # of runs that have ended

    def open(self) -> list[Cell]:
        """The runs of this part that have not ended, or have failed."""
        ended = {cell.name: read_ended(cell.directory) for cell in self.mine}
        return [cell for cell in self.mine if (how := ended[cell.name]) is None or how.status == "failed"]

    def train(self, jobs: int, devices: Sequence[str] = (), retries: int = 1) -> Iterator[Change]:
        """Train what is open, and keep the table.

        Args:
            jobs: Runs at a time.
            devices: GPUs for each process; see :class:`~megatron_stable.study.pool.Pool`.
            retries: Times that a run that failed is tried again.

        Raises:
            ConfigError: Another process trains these runs.
            KeyboardInterrupt: A signal stopped it, in order.
        """
        with self._locked(".lock" if self._part.of == 1 else ".lock-{}-of-{}".format(*self._part)) as mine:
            if not mine:
                raise ConfigError(f"{self.directory} is being trained by another process: wait for it, or end it")
            waiting, due = self.open(), time.monotonic() + EVERY
            for cell in waiting:  # a failure is not the last word
                (cell.directory / ENDED).unlink(missing_ok=True)
            try:
                for change in Pool(self.grid.ranks, jobs, devices, retries).train(waiting):
                    yield change
                    began = time.monotonic()
                    if change.cell is not None and began > due:
                        self._write_early()
                        # a large table must not keep runs waiting
                        due = time.monotonic() + max(EVERY, SHARE * (time.monotonic() - began))
            finally:
                self.write()

    def rows(self) -> list[Row]:
        """The table, as things stand."""
        return [row for row, _ in self._outcomes()]

    def write(self) -> list[Row]:
        """Write the table and what was measured, as things stand; the rows. DataError: they cannot be written."""
        with self._locked(".table", wait=True):
            return self._write()

    def _write_early(self) -> None:
        """Write the table of a sweep in progress, unless another part does."""
        with self._locked(".table") as mine, suppress(DataError):  # of the last one is told
            if mine:
                self._write()

    def _write(self) -> list[Row]:
        import pyarrow as pa
        import pyarrow.parquet

        found = self._outcomes()
        rows = [row for row, _ in found]
        write_file(self.directory / FILE, self.grid.path.read_bytes())
        write_table(rows, self.directory)
        data = io.BytesIO()
        pa.parquet.write_table(pa.concat_tables([measured for _, measured in found]).unify_dictionaries(), data)
        write_file(self.directory / MEASURED, data.getvalue())
        return rows

    def _outcomes(self) -> list[Outcome]:
        found = []
        for cell in self.cells:
            known = self._known.get(cell.name)
            if known is None:
                row, numbers = outcome(cell)
                known = Outcome(row, _columns(cell.name, numbers))
            if known.row["status"] in ("finished", "diverged"):
                self._known[cell.name] = known
            found.append(known)
        return found

    @contextmanager
    def _locked(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Whether no other process has what a lock stands for; until the end of the block this one has it then."""
        path = self.directory / name
        with explain_os_errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("wb")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            except OSError:
                pass  # a file system without locks; each run has its own, of another kind
            yield True


def _columns(run: str, numbers: Sequence[Measured]) -> Any:
    """What was measured in a run, as a table."""
    import pyarrow as pa

    steps, tags, values = zip(*numbers, strict=True) if numbers else ((), (), ())
    text = pa.dictionary(pa.int32(), pa.string())
    kinds = {"run": text, "step": pa.int64(), "tag": text, "value": pa.float64()}
    columns = ([run] * len(numbers), steps, tags, values)
    return pa.table([pa.array(each, kind) for each, kind in zip(columns, kinds.values(), strict=True)], list(kinds))


def _ready(grid: Grid) -> list[Cell]:
    """The runs, with their vocabularies known and their data there."""
    problems: dict[str, None] = {}
    sizes: dict[str | None, int | None] = {None: None}
    cells, opened = [], set()
    for cell in grid.cells:
        data = cell.config.data
        try:
            if data.tokenizer not in sizes:
                assert data.tokenizer is not None
                sizes[data.tokenizer] = Tokenizer(data.tokenizer).vocab_size
            cells.append(cell._replace(config=with_vocabulary(cell.config, sizes[data.tokenizer])))
            if data.train is None and not data.stages:
                raise ConfigError("data.train is not set: name the prefix of a .bin/.idx dataset, below config")
            for source, stages in ((data.train, data.stages), (data.validation, ())):
                key = (json.dumps([source, stages]), length := cell.config.model.sequence_length)
                if (source is not None or stages) and key not in opened:
                    opened.add(key)
                    open_dataset(source, length, 0, stages)
        except MegatronStableError as error:
            problems[str(error)] = None
    problems |= dict.fromkeys(problem for cell in cells if (problem := _other(cell)))
    if problems:
        raise ConfigError("\n  ".join([f"{grid.path}: {len(problems)} problem{'s' * (len(problems) > 1)}", *problems]))
    return cells


def _other(cell: Cell) -> str | None:
    """Whether the run's directory is that of another run."""
    path = RunDirectory(cell.directory).config
    if not path.is_file():
        return None
    changed = differences(load_config(path), cell.config)
    if not changed:
        return None
    what = "; ".join(f"{key}: {before} there, {now} here" for key, (before, now) in changed.items())
    return f"{cell.directory} was trained with other settings ({what}): choose another directory for the sweep"
