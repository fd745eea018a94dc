"""What TensorBoard costs a step that is measured: thousands of numbers as one entry of the file, and one by one.

::

    python benchmarks/board.py --layers 48
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from megatron_stable.config.schema import Config
from megatron_stable.records.metrics import Record
from megatron_stable.records.tags import scalars
from megatron_stable.records.tensorboard import TensorBoard
from megatron_stable.stability.probes import PROBES, places


def main() -> None:
    """Print seconds of the training process per record, and bytes of the file, by both ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=48, help="of the model")
    parser.add_argument("--records", type=int, default=20, help="measured steps")
    given = parser.parse_args()
    tags = [where.tag for probe in PROBES.values() for where in places(probe, given.layers)]
    records: list[Record] = [
        {"step": step, "loss": 2.0, **{tag: step + number / 7 for number, tag in enumerate(tags)}}
        for step in range(1, given.records + 1)
    ]
    print(f"{given.layers} layers, {len(scalars(records[0])):,} numbers per record")
    for name, way in (("one entry", as_one), ("one by one", one_by_one)):
        with tempfile.TemporaryDirectory() as folder:
            seconds, all_in_all = way(Path(folder), records)
            size = sum(file.stat().st_size for file in Path(folder).iterdir()) / len(records)
        print(
            f"{name:>10}: {1000 * seconds:6.1f} ms in the training loop, {1000 * all_in_all:6.1f} ms of processor time "
            f"with the writing thread, {size / 1000:,.0f} kB per record"
        )


def as_one(folder: Path, records: list[Record]) -> tuple[float, float]:
    """As records/tensorboard.py writes them."""
    writer = TensorBoard(folder, 1, Config())
    return timed(writer.record, writer.close, records)


def one_by_one(folder: Path, records: list[Record]) -> tuple[float, float]:
    """As ``SummaryWriter.add_scalar`` does."""
    from torch.utils.tensorboard.writer import SummaryWriter

    writer = SummaryWriter(str(folder))

    def write(record: Record) -> None:
        for tag, value in scalars(record).items():
            writer.add_scalar(tag, value, record["step"])

    return timed(write, writer.close, records)


def timed(write: Callable[[Record], None], close: Callable[[], None], records: list[Record]) -> tuple[float, float]:
    """(median seconds that a call takes, seconds of processor time per record in all)."""
    write(records[0])
    calls, began = [], time.process_time()
    for record in records:
        start = time.perf_counter()
        write(record)
        calls.append(time.perf_counter() - start)
    close()
    return statistics.median(calls), (time.process_time() - began) / len(records)


if __name__ == "__main__":
    main()
