"""The table of a sweep: a row for each run, with its configuration, what became of it, and what was measured in it.

Columns, in this order: ``RESULTS`` below; a column for each axis that has labels (``size``); a column for each probe,
under its tag without the layer (``attention/max_logit``, ``output_norm/qkv``): its mean over the last tenth of the run,
of the layer that has the largest, or for ``SMALLEST`` the smallest; a column for each field of the configuration, by
dotted key (``optimizer.learning_rate``). A value that is not known is null; losses are nats per token.

Beside ``table.csv`` and ``table.parquet`` lies ``probes.parquet``, with a row for each number that was measured: run,
step, tag, value.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_stable.config.schema import Config
from megatron_stable.errors import ConfigError
from megatron_stable.files import explain_os_errors, write_file
from megatron_stable.stability.probes import PROBES

Row = dict[str, Any]

RATE, SEED = "optimizer.learning_rate", "run.seed"
PRESETS = ("model.size", "model.recipe")  # fields from which others follow
# in the directory of a sweep: what made it, its runs, and what was measured in them
FILE, TABLE, MEASURED = "sweep.yaml", "table", "probes.parquet"

RESULTS = {
    "name": "of the run; its directory is runs/NAME",
    "status": "finished, diverged, failed, or unfinished",
    "reason": "why it diverged or failed",
    "parameters": "in the blocks, without embedding and head, as arXiv 2309.14322 counts",
    "parameters_total": "all",
    "steps": "trained",
    "initial_loss": "at initialisation: of the first batch, before an update",
    "lowest_loss": "lowest median of 9 steps in a row",
    "train_loss": "mean over the last tenth of the steps",
    "validation_loss": "after the last step",
    "loss": "validation_loss, where there is one, else train_loss",
    "score": "min(loss, initial_loss); of a run that diverged, initial_loss",
    "rise": "what was lost again at the end, as a part of what had been learnt: (last median - lowest_loss) / "
    "(initial_loss - lowest_loss)",
    "diverged_at": "step at which the rise began that ended as divergence",
    "spikes": "of the loss, as the guard saw them",
    "dropped_updates": "that the guard did not make, or could not be made",
    "warnings": "of what was measured inside",
    "first_warning": "its step",
    "seconds": "of training",
    "tokens_per_second": "median",
}
TIMES = ("seconds", "tokens_per_second")  # differ from one run of a sweep to the next
SMALLEST = ("attention/entropy", "grad_rms", "moment_rms")  # of the layers, the smallest; of other probes, the largest
STATUS = ("finished", "diverged", "failed", "unfinished")


def labels(rows: Sequence[Row]) -> list[str]:
    """The columns of axes whose values have labels."""
    known = RESULTS.keys() | PROBES.keys()
    return [column for column in _columns(rows) if not set("./") & set(column) and column not in known]


def axes(rows: Sequence[Row]) -> list[str]:
    """What tells the runs apart: labelled axes, presets, and fields that vary and do not follow from one of these."""
    fields = [column for column in _columns(rows) if column in _KEYS and len(_values(rows, column)) > 1]
    found = labels(rows)
    for preset in PRESETS:
        if preset in fields and not any(_follows(rows, preset, known) for known in found):
            found.append(preset)
    return found + [
        field for field in fields if field in (RATE, SEED) or not any(_follows(rows, field, known) for known in found)
    ]


def write_table(rows: Sequence[Row], directory: Path) -> None:
    """Write ``table.csv`` and ``table.parquet``, each whole or not at all. DataError: they cannot be written."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    table = pa.table({column: _plain([row.get(column) for row in rows]) for column in _columns(rows)})
    for suffix, write in ((".csv", pa.csv.write_csv), (".parquet", pa.parquet.write_table)):
        data = io.BytesIO()
        write(table, data)
        write_file(directory / f"{TABLE}{suffix}", data.getvalue())


def read_table(path: Path) -> list[Row]:
    """The rows of a sweep: of its directory, or of a table.csv or table.parquet wherever it lies.

    Raises:
        ConfigError: There is none.
        DataError: It cannot be read.
    """
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    file = path / f"{TABLE}.parquet" if path.is_dir() else path
    if not file.is_file() or file.suffix not in (".csv", ".parquet"):
        raise ConfigError(f"{path} is no table of a sweep: name a sweep's directory, a table.csv or a table.parquet")
    read = pa.csv.read_csv if file.suffix == ".csv" else pa.parquet.read_table
    with explain_os_errors("read", file):
        try:
            rows: list[Row] = read(file).to_pylist()
        except pa.ArrowInvalid as error:
            raise ConfigError(f"{file} is no table of a sweep: {error}") from error
    if rows and not {"name", "status", "score", RATE} <= rows[0].keys():
        raise ConfigError(f"{file} is no table of a sweep: it lacks the columns name, status, score and {RATE}")
    return rows


_KEYS = Config().by_key().keys()


def _columns(rows: Iterable[Row]) -> list[str]:
    found = dict.fromkeys(column for row in rows for column in row)
    others = [column for column in found if column not in RESULTS and column not in _KEYS]
    probes = [column for column in others if "/" in column or column in PROBES]
    order = [*RESULTS, *(column for column in others if column not in probes), *probes, *_KEYS]
    return [column for column in order if column in found]


def _values(rows: Sequence[Row], column: str) -> set[str]:
    return {json.dumps(row.get(column)) for row in rows}


def _follows(rows: Sequence[Row], field: str, label: str) -> bool:
    """Whether a field is a function of another column."""
    pairs = {(json.dumps(row.get(label)), json.dumps(row.get(field))) for row in rows}
    return len(pairs) == len(_values(rows, label))


def _plain(values: list[Any]) -> list[Any]:
    """The values of a column as both formats hold them: all numbers, all flags or all text."""
    kinds = {type(value) for value in values} - {type(None)}
    exact = 2**53 if float in kinds else 2**63 - 1
    small = all(abs(value) <= exact for value in values if type(value) is int)
    if (kinds <= {int, float} and small) or (len(kinds) == 1 and kinds <= {bool, str}):
        return values
    return [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
