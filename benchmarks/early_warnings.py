"""Early warnings, tried on real runs: how long before the loss rises, how often in vain, and whether intervals hold.

    python benchmarks/early_warnings.py                      # all of it: half an hour on two cores
    python benchmarks/early_warnings.py --part tune          # the runs that the rules' constants were set on
    python benchmarks/early_warnings.py --write              # the numbers that warnings cite, into the package

Small models on the source of Python's standard library, one rank each, by the verb `pretrain`; kept below --output, so
that the same command goes on where it was stopped. All that is counted is read from metrics.jsonl.

diverging   `baseline`, `soft_temp` and `soft_clip` at rates at which the loss turns within the warm-up.
healthy     `baseline` at a usual rate, `qk_norm_cap` and `olmo2` at usual rates and at high ones.

The onset is that of the first rise or divergence that the detector finds in the loss, with the run's guard settings.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from megatron_stable.data import preprocess, train_tokenizer
from megatron_stable.data.standard_library import write_standard_library

SETTINGS = (
    "model.size=tiny", "model.sequence_length=64", "batch.global_size=32", "batch.micro_size=32", "run.steps=200",
    "precision.dtype=fp32", "schedule.kind=constant", "schedule.warmup_steps=150", "logging.tensorboard=false",
    "logging.probes_every=2", "checkpoint.every=100000",
    # a guard for runs of two hundred steps, which only watches
    "guard.mode=watch", "guard.window=30", "guard.warmup=30", "guard.threshold=6", "guard.patience=8",
    "guard.drift=0.03",
)  # fmt: skip
SIZES = {"small": ("model.layers=2", "model.hidden=64"), "medium": ("model.layers=3", "model.hidden=96")}
HEALTHY = (("baseline", 0.005), ("qk_norm_cap", 0.02), ("qk_norm_cap", 0.3), ("olmo2", 0.02), ("olmo2", 0.1))


class Run(NamedTuple):
    """A run: what is expected of it, and its settings."""

    part: str
    healthy: bool
    size: str
    recipe: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.part}/{self.size}-{self.recipe}-{self.rate:g}-{self.seed}"

    @property
    def settings(self) -> tuple[str, ...]:
        """Beside those of all."""
        own = (f"model.recipe={self.recipe}", f"optimizer.learning_rate={self.rate}", f"run.seed={self.seed}")
        return (*SETTINGS, *SIZES[self.size], *own)


def runs(part: str) -> Iterator[Run]:
    """The runs that constants were set on, or the held-out ones: of other seeds, and another rate besides."""
    if part == "tune":
        for seed, size in enumerate(SIZES, 1):
            yield from (Run(part, False, size, recipe, 0.5, seed) for recipe in ("baseline", "soft_temp", "soft_clip"))
            yield from (Run(part, True, size, *choice, seed) for choice in HEALTHY)
        return
    for seed in range(11, 21):
        for number, size in enumerate(SIZES):
            yield Run(part, False, size, "baseline", (0.3, 0.5)[seed % 2], seed)
            yield Run(part, True, size, *HEALTHY[(seed + number) % 5], seed)
    for seed in range(11, 21):
        yield Run(part, False, "small", ("soft_temp", "soft_clip")[seed % 2], 0.5, seed)
        yield from (Run(part, True, size, *HEALTHY[(seed + number + 2) % 5], seed) for number, size in enumerate(SIZES))


def train(run: Run, root: Path) -> Run:
    """Do a run, unless it is there."""
    directory = root / run.name
    done = directory / "done"
    if not done.is_file():
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        (directory / "config.yaml").write_text(f"run: {{directory: {directory / 'run'}}}\n")
        data = (f"data.train={root / 'train'}", f"data.tokenizer={root / 'tok.model'}")
        verb = (sys.executable, "-m", "megatron_stable", "pretrain", "--config", str(directory / "config.yaml"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        printed = subprocess.run(
            (*verb, *run.settings, *data), env=environment, capture_output=True, text=True, check=False
        )
        if printed.returncode:
            raise SystemExit(f"{run.name}: exit code {printed.returncode}\n{printed.stdout}\n{printed.stderr}")
        shutil.rmtree(directory / "run/checkpoints")
        done.touch()
    return run


def prepare(root: Path) -> None:
    """Text, tokenizer and data, unless they are there."""
    if not (root / "train.idx").is_file():
        root.mkdir(parents=True, exist_ok=True)
        write_standard_library(root / "text.jsonl")
        train_tokenizer([root / "text.jsonl"], 512, root / "tok.model")
        preprocess([root / "text.jsonl"], root / "tok.model", root / "train")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("tune", "held-out"), default="held-out")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/early_warnings"))
    args = parser.parse_args()
    prepare(args.output)
    with ThreadPoolExecutor(args.jobs) as pool:
        for run in pool.map(lambda run: train(run, args.output), runs(args.part)):
            print(run.name, flush=True)


if __name__ == "__main__":
    main()
