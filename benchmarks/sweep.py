"""A sweep of small runs against a shell loop over ``pretrain``: the same runs, whole time, side by side.

    python benchmarks/sweep.py                  # 24 runs of 200 steps, two at a time
    python benchmarks/sweep.py --runs 8 --steps 60

Both train as many runs at a time. "In steps" is the part of the processes' time that went into training steps, as the
runs' own records have it; the rest is starting up, importing, checkpoints and the table. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from megatron_stable.data.standard_library import write_standard_library
from megatron_stable.study.grid import Grid, read_grid
from megatron_stable.study.table import read_table

PROGRAM = [sys.executable, "-m", "megatron_stable"]


def write_sweep(folder: Path, name: str, runs: int, steps: int) -> Path:
    """A sweep over learning rates and seeds."""
    config = {
        "run": {"steps": steps},
        "model": {"size": None, "layers": 2, "hidden": 64, "heads": 2, "sequence_length": 64},
        "data": {"tokenizer": str(folder / "tokenizer.model"), "train": str(folder / "data")},
        "batch": {"global_size": 16, "micro_size": 16},
        "schedule": {"warmup_steps": 20},
    }
    axes = {
        "optimizer.learning_rate": [1e-3, 3e-3, 1e-2, 3e-2],
        "run.seed": list(range(1, runs // 4 + 1)),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"directory": str(folder / name), "config": config, "axes": axes}))
    return path


def measured(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and seconds of processor time, that some work and its processes take."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run(*arguments: object) -> None:
    """One command line."""
    done = subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)


def loop(grid: Grid, jobs: int) -> None:
    """What one would write in a shell: ``xargs -P JOBS`` over ``pretrain``."""

    def pretrain(number: int) -> None:
        config = grid.path.with_name(f"{grid.path.stem}_{number}.yaml")
        config.write_text(yaml.safe_dump(grid.cells[number].config.model_dump(mode="json")))
        run("pretrain", "--config", config)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(pretrain, range(len(grid.cells))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=24, help="a multiple of 4")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(f"CPU, {os.cpu_count()} cores, 1 thread a run; Python {platform.python_version()}; {vars(args)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_standard_library(folder / "text.jsonl", most_bytes=4_000_000)
        run("tokenizer", "--input", folder / "text.jsonl", "--vocab-size", 512, "--output", folder / "tokenizer.model")
        data = ("--tokenizer", folder / "tokenizer.model", "--output", folder / "data")
        run("preprocess", "--input", folder / "text.jsonl", *data)
        sweep = write_sweep(folder, "sweep", args.runs, args.steps)
        grid = read_grid(write_sweep(folder, "loop", args.runs, args.steps))
        ours = measured(lambda: run("sweep", sweep, "--jobs", args.jobs))
        theirs = measured(lambda: loop(grid, args.jobs))
        steps = sum(row["seconds"] for row in read_table(folder / "sweep"))
        run("sweep", grid.path, "--table")
        steps_of_loop = sum(row["seconds"] for row in read_table(folder / "loop"))
    print(f"{'':12}{'whole time':>12}{'processor':>12}{'in steps':>10}")
    for name, (seconds, processor), trained in (("sweep", ours, steps), ("shell loop", theirs, steps_of_loop)):
        print(f"{name:12}{seconds:10.1f} s{processor:10.1f} s{trained / (seconds * args.jobs):10.1%}")
    print(f"shell loop / sweep: {theirs[0] / ours[0]:.2f} x the time, {theirs[1] / ours[1]:.2f} x the processor time")


if __name__ == "__main__":
    main()
