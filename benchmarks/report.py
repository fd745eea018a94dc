"""What a report costs of a run as long as runs get: time, memory, size of the page.

    python benchmarks/report.py                                # 10^6 steps, 10^4 of them measured, of 48 layers
    python benchmarks/report.py --probes-every 10              # as by default, a file of 14 GB
    python benchmarks/report.py --steps 20000 --layers 12

The run is made up: noise, with one step at which every probe is a hundred times as high, which has to show. Its file is
removed in the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from megatron_stable.analysis.report.page import render
from megatron_stable.analysis.report.reading import where
from megatron_stable.analysis.report.run import open_runs
from megatron_stable.analysis.report.thinning import standing_out
from megatron_stable.config.load import dump_config, load_config
from megatron_stable.stability.probes import PROBES, places

PATTERNS = 64  # different records of probes, in turn: to write them takes longer than to read them


def make(run: Path, steps: int, every: int, layers: int, peak: int) -> int:
    """Write a run's directory; returns the size of its metrics in bytes."""
    config = load_config(None, [f"run.steps={steps}", f"logging.probes_every={every}"])
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(config))
    tags = [place.tag for probe in PROBES.values() for place in places(probe, layers)]
    random = np.random.default_rng(0)
    usual = np.linspace(0.5, 2, len(tags))
    noisy = [usual * np.exp(0.1 * random.standard_normal(len(tags))) for _ in range(PATTERNS)]
    measured = [_joined(tags, values) for values in noisy]
    loss = 2 + 5 * np.arange(1, steps + 1) ** -0.4 + 0.02 * random.standard_normal(steps)
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            record = {
                "step": step, "loss": loss[step - 1].item(), "z_loss": 0.0, "grad_norm": 0.5, "learning_rate": 3e-4,
                "loss_scale": 1.0, "tokens": 4096 * step, "tokens_per_second": 1e6, "skipped": False, "data_step": step,
                "samples": [[512 * step, 512 * step + 512]], "loss_score": 0.1, "grad_norm_score": 0.1,
            }  # fmt: skip
            line = json.dumps(record)
            if step % every == 0:
                inside = _joined(tags, 100 * usual) if step == peak else measured[step // every % PATTERNS]
                line = f"{line[:-1]}, {inside}}}"
            file.write(f"{line}\n")
    return (run / "metrics.jsonl").stat().st_size


def _joined(tags: list[str], values: np.ndarray) -> str:
    return ", ".join(f'"{tag}": {value:.5g}' for tag, value in zip(tags, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--probes-every", type=int, default=100)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--directory", type=Path, help="where there is room; default: of temporary files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        run, every = Path(directory) / "run", args.probes_every
        peak = args.steps // 3 // every * every
        size = make(run, args.steps, every, args.layers, peak)
        print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
        print(
            f"{args.steps:,} steps, {args.steps // every:,} of them measured, {args.layers} layers: {size / 1e9:.2f} GB"
        )
        began = time.perf_counter(), time.process_time()
        runs = open_runs([run])
        read = time.perf_counter(), time.process_time()
        page = render(runs)
        drawn = time.perf_counter(), time.process_time()
        series = runs[0].curves.series
        probes = [key for key in series.keys if where(key) is not None]
        least, mean, most, _ = series.table(probes)
        shown = standing_out(least, mean, most, log=True)[:, (peak - 1) // series.width]
        usual = np.nanmedian(mean, axis=1)
        for what, start, end in (("read", began, read), ("drawn", read, drawn)):
            print(f"{what:6} {end[0] - start[0]:7.1f} s, {end[1] - start[1]:.1f} s of processor time")
        print(
            f"memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:7.0f} MB at most, all libraries included"
        )
        print(f"page   {len(page.encode()) / 1e6:7.2f} MB, {page.count('<svg')} figures of {len(series.keys):,} series")
        print(f"the step with the peak shows in {int((shown > 50 * usual).sum()):,} of {len(probes):,} probes")


if __name__ == "__main__":
    main()
