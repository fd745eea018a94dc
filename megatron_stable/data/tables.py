"""The text column of Parquet and Arrow files, row by row."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from math import ceil
from pathlib import Path
from typing import Any

from megatron_stable.errors import DataError

SUFFIXES = (".parquet", ".arrow", ".feather")
BATCH_ROWS = 1024


def read_table(path: Path, size: int, text_key: str, first: int, end: int) -> Iterator[tuple[int, bytes, int]]:
    """Rows of a file of `size` bytes as (row from 1, the text's bytes, position behind it).

    Row r of n, from 0, is taken to begin at byte size x r // n; those that begin in [first, end) are read.
    """
    try:
        import pyarrow as pa
    except ImportError:
        raise DataError(f"reading {path} needs the package pyarrow: pip install pyarrow") from None
    what = "Parquet" if path.suffix == ".parquet" else "Arrow"
    try:
        if what == "Parquet":
            import pyarrow.parquet as pq

            with pq.ParquetFile(path) as file:
                _check_column(path, file.schema_arrow, text_key)
                groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                begin, stop = _rows(sum(groups), size, first, end)
                wanted, skipped = _overlapping(groups, begin, stop)
                found = file.iter_batches(BATCH_ROWS, row_groups=wanted, columns=[text_key]) if wanted else iter(())
                yield from _texts((batch.column(0) for batch in found), skipped, begin, stop, size, sum(groups))
        else:
            with pa.memory_map(str(path)) as source, _open_arrow(source) as file:
                _check_column(path, file.schema, text_key)
                batches = list(_batches(file))  # mapped: nothing is read yet
                rows = sum(batch.num_rows for batch in batches)
                begin, stop = _rows(rows, size, first, end)
                yield from _texts((batch.column(text_key) for batch in batches), 0, begin, stop, size, rows)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: broken {what} file ({error})") from error


def _open_arrow(source: Any) -> Any:
    """Arrow's file format, or its stream format, in which Hugging Face's datasets are kept."""
    import pyarrow as pa

    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source)


def _batches(file: Any) -> Iterator[Any]:
    if hasattr(file, "num_record_batches"):
        yield from (file.get_batch(i) for i in range(file.num_record_batches))
    else:
        yield from file


def _check_column(path: Path, schema: Any, text_key: str) -> None:
    import pyarrow as pa

    if text_key not in schema.names:
        raise DataError(f"{path}: no column {text_key!r}; {suggest(text_key, schema.names, 'column')}")
    kind = schema.field(text_key).type
    value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if str(value_kind) not in ("string", "large_string", "string_view", "binary", "large_binary", "null"):
        raise DataError(f"{path}: column {text_key!r} is {kind}, not text")


def _rows(rows: int, size: int, first: int, end: int) -> tuple[int, int]:
    """The rows [begin, stop) that begin in bytes [first, end)."""
    return min(rows, ceil(first * rows / size)) if first else 0, rows if end >= size else ceil(end * rows / size)


def _overlapping(groups: list[int], begin: int, stop: int) -> tuple[list[int], int]:
    """Which groups of rows have some of the rows [begin, stop), and how many rows lie before them."""
    wanted: list[int] = []
    before = row = 0
    for i, count in enumerate(groups):
        if row < stop and begin < row + count:
            before = before if wanted else row
            wanted.append(i)
        row += count
    return wanted, before


def _texts(
    columns: Iterable[Any], row: int, begin: int, stop: int, size: int, rows: int
) -> Iterator[tuple[int, bytes, int]]:
    """The values of rows [begin, stop) of columns of which the first begins with `row`."""
    import pyarrow as pa

    for column in columns:
        start, row = row, row + len(column)
        column = column[max(0, begin - start) : max(0, stop - start)]
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        # As bytes, because Arrow does not check that its strings are UTF-8.
        for number, value in enumerate(column.cast(pa.large_binary()), start=max(begin, start) + 1):
            yield number, value.as_py() or b"", size * number // rows


def suggest(key: str, available: Iterable[str], what: str) -> str:
    """A hint at what `key` may have been meant to be."""
    names = list(available)
    near = difflib.get_close_matches(key, names, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"choose the {what} with --text-key, there is: {', '.join(names[:10])}"
