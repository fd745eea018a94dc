"""How long it takes to read the series of a long run and to find its spikes.

    python benchmarks/series.py                     # 10^6 points of loss, of gradient norm, and two other tags
    python benchmarks/series.py --points 100000

The event file is written by TensorBoard's own writer, one scalar to a record as PyTorch does it; `metrics.jsonl` holds
lines such as a run writes. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_stable.analysis.series import read_series
from megatron_stable.stability.detector import find_spikes

TAGS = {"lm loss": "loss", "grad-norm": "grad_norm", "learning-rate": "learning_rate", "loss-scale": "loss_scale"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=10**6)
    args = parser.parse_args()
    print(f"{args.points:,} steps; {os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}")
    values = curves(args.points)
    with tempfile.TemporaryDirectory() as scratch:
        for name, write in (("TensorBoard", write_events), ("metrics.jsonl", write_metrics)):
            directory = Path(scratch) / name
            directory.mkdir()
            path = write(directory, values)
            size = path.stat().st_size / 1e6
            began = time.perf_counter()
            series = read_series(directory)
            read = time.perf_counter() - began
            spikes = find_spikes(series.steps.tolist(), series.values.tolist())
            searched = time.perf_counter() - began - read
            print(f"{name:14} {size:6.0f} MB: {read:5.2f} s to read, {searched:5.2f} s to search, {len(spikes)} spikes")
            began = time.perf_counter()
            command = [sys.executable, "-m", "megatron_stable", "spikes", str(directory), "--json"]
            subprocess.run(command, check=True, capture_output=True)
            print(f"{'':14} {time.perf_counter() - began:18.2f} s for the verb `spikes`, start of Python included")


def curves(points: int) -> dict[str, np.ndarray]:
    """A loss that falls, with ten spikes that the gradient norm leads by two steps, and what goes with it."""
    random = np.random.default_rng(0)
    steps = np.arange(1, points + 1)
    loss = 2 + 9 * steps**-0.3 + 0.02 * random.standard_normal(points)
    norm = 0.3 * np.exp(0.1 * random.standard_normal(points))
    for at in np.linspace(0, points, 12, dtype=int)[1:-1]:
        loss[at : at + 8] += 2
        norm[at - 2 : at + 8] *= 20
    return {"loss": loss, "grad_norm": norm, "learning_rate": np.full(points, 1e-4), "loss_scale": np.ones(points)}


def write_events(directory: Path, values: dict[str, np.ndarray]) -> Path:
    """One event file."""
    path = directory / "events.out.tfevents.1700000000.host"
    with path.open("wb") as file:
        records = RecordWriter(file)
        records.write(Event(wall_time=1.7e9, file_version="brain.Event:2").SerializeToString())
        for i in range(len(values["loss"])):
            for tag, key in TAGS.items():
                summary = Summary(value=[Summary.Value(tag=tag, simple_value=values[key][i])])
                records.write(Event(wall_time=1.7e9 + i, step=i + 1, summary=summary).SerializeToString())
    return path


def write_metrics(directory: Path, values: dict[str, np.ndarray]) -> Path:
    """A run's own record."""
    path = directory / "metrics.jsonl"
    with path.open("w") as file:
        for i in range(len(values["loss"])):
            line = {"step": i + 1, **{key: float(value[i]) for key, value in values.items()}, "tokens": 4096 * (i + 1)}
            line |= {"tokens_per_second": 12345.6, "mfu": None, "skipped": 0, "data_step": i + 1}
            file.write(json.dumps(line) + "\n")
    return path


if __name__ == "__main__":
    main()
