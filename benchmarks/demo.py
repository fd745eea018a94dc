"""How often the demo shows what it promises: both of its runs over many seeds, with its own settings.

    python benchmarks/demo.py                                       # 20 seeds, two runs at a time
    python benchmarks/demo.py --seeds 5 optimizer.learning_rate=0.2 guard.patience=16

Text, tokenizer and data are made once. A run is one rank with one thread; what is there of the same settings is not
trained again, so that the same command goes on where it was stopped, and seeds can be added. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from pydantic import BaseModel

from megatron_stable.commands.demo import RECIPES, SETTINGS, attempts, ended, levels, outcome, prepare
from megatron_stable.config.load import load_config
from megatron_stable.config.schema import Config
from megatron_stable.records.directory import RunDirectory
from megatron_stable.stability.events import GaveUp, Rollback


class Result(BaseModel):
    """Of one run.

    Attributes:
        lowest, last: Training loss in nats, as means of a few steps.
        onset, acted: Steps: of what the guard first acted on, and of that action.
        reason: What it said then.
        seconds: From the start of the process to its end.
    """

    recipe: str
    seed: int
    lowest: float | None
    last: float | None
    onset: int | None = None
    acted: int | None = None
    reason: str = ""
    outcome: str
    seconds: float

    def row(self) -> str:
        """A line of the table."""
        numbers = (self.seed, *(None if x is None else f"{x:.2f}" for x in (self.lowest, self.last)))
        cells = ("-" if x is None else x for x in (*numbers, self.onset, self.acted, round(self.seconds)))
        return (
            f"{self.recipe:12}" + "".join(f"{cell:>8}" for cell in cells) + f"  {self.outcome} {self.reason}".rstrip()
        )


class Report(BaseModel):
    """What `--output` writes."""

    machine: str
    settings: list[str]
    results: list[Result]


def train(directory: Path, run: Path, settings: Sequence[str], config: Config, recipe: str, seed: int) -> Result:
    """Train a run from its beginning, or read its result if it is there. RuntimeError: it came to no end."""
    known = run / "result.json"
    if known.is_file():
        return Result.model_validate_json(known.read_bytes())
    shutil.rmtree(run, ignore_errors=True)  # what was interrupted begins anew: its time would be none
    run.parent.mkdir(parents=True, exist_ok=True)
    # fmt: off
    command = [
        sys.executable, "-m", "megatron_stable", "pretrain", "--config", str(directory / "config.yaml"), *settings,
        f"run.directory={run}", f"run.seed={seed}", f"model.recipe={recipe}",
        f"batch.micro_size={config.batch.global_size}",
    ]
    # fmt: on
    log, began = run.with_suffix(".log"), time.monotonic()
    with log.open("wb") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if not ended(run, config.run.steps):
        raise RuntimeError(f"{run} came to no end: exit code {code}, see {log}")
    events = RunDirectory(run).ledger.read()
    act = next((event for event in events if isinstance(event, (Rollback, GaveUp)) and event.by == "guard"), None)
    lowest, last = levels(attempts(run))
    result = Result(
        recipe=recipe,
        seed=seed,
        lowest=lowest,
        last=last,
        onset=act and act.onset,
        acted=act and act.step,
        reason=f"({act.reason})" if act else "",
        outcome=outcome(events, config.run.steps),
        seconds=time.monotonic() - began,
    )
    known.write_text(result.model_dump_json())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that differ from the demo's")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--directory", type=Path, default=Path("runs/demo-benchmark"))
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    args = parser.parse_intermixed_args()
    settings = [*SETTINGS, *args.overrides]
    config = load_config(None, settings)
    prepare(args.directory)
    folder = args.directory / hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:8]
    machine = f"{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"\n{machine}; {args.jobs} runs at a time in {folder}; the demo's settings {' '.join(args.overrides)}\n")
    print(f"{'recipe':12}" + "".join(f"{name:>8}" for name in ("seed", "lowest", "last", "onset", "acted", "seconds")))
    results: list[Result] = []
    with ThreadPoolExecutor(args.jobs) as pool:
        pending = [
            pool.submit(train, args.directory, folder / f"{recipe}-{seed}", settings, config, recipe, seed)
            for seed in range(args.first_seed, args.first_seed + args.seeds)
            for recipe in args.recipes
        ]
        try:
            for future in as_completed(pending):
                results.append(future.result())
                print(results[-1].row(), flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    results.sort(key=lambda result: (args.recipes.index(result.recipe), result.seed))
    print()
    for recipe in args.recipes:
        acted = [result.acted is not None for result in results if result.recipe == recipe]
        print(
            f"{recipe}: the guard acted in {sum(acted)} of {len(acted)}; the others reached their last step without it"
        )
    print(f"a run takes {statistics.median(result.seconds for result in results):.0f} s (median)")
    if args.output:
        report = Report(machine=machine, settings=settings, results=results)
        args.output.write_text(report.model_dump_json(indent=1) + "\n")


if __name__ == "__main__":
    main()
