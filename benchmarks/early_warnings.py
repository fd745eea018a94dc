"""Early warnings, tried on real runs: how long before the loss rises, how often in vain, and whether intervals hold.

    python benchmarks/early_warnings.py                  # the held-out runs: half an hour on two cores
    python benchmarks/early_warnings.py --write          # besides, the numbers that warnings cite, into the package
    python benchmarks/early_warnings.py --part tune      # the runs that the rules' constants were set on
    python benchmarks/early_warnings.py --part between   # rates that harm, at which the loss does not turn
    python benchmarks/early_warnings.py --cost           # what a measured step of 48 layers costs

Small models on the source of Python's standard library, one rank each, by the verb `pretrain`; kept below --output, so
that the same command goes on where it was stopped. All that is counted is read from metrics.jsonl.

diverging   `baseline`, `soft_temp` and `soft_clip` at rates at which the loss turns within the warm-up.
healthy     `baseline` at a usual rate, `qk_norm_cap` and `olmo2` at usual rates and at high ones.
between     `baseline` at 4 to 20 times its usual rate, `peri_ln` at 100 times: neither of the two.

onset       The first step of the first rise or divergence that the detector finds in the loss, with the run's guard
            settings. For a slow rise it is the step of the lowest level.
lead        From the first warning of any rule to the onset.
right       Said before the onset of a run that has one. What is first said behind the onset counts as late.
intervals   Of each series that passes the threshold of a rule, what was measured in the first half of the steps to
            there is extrapolated: does the interval hold the step?
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from math import inf, log, nan
from pathlib import Path
from statistics import fmean, median
from time import process_time
from typing import NamedTuple

import numpy as np

from megatron_stable.config.load import load_config
from megatron_stable.config.schema import Config
from megatron_stable.data import preprocess, train_tokenizer
from megatron_stable.data.standard_library import write_standard_library
from megatron_stable.records.directory import RunDirectory
from megatron_stable.records.metrics import Record, latest, read_metrics
from megatron_stable.stability import track_record
from megatron_stable.stability.detector import LOSS, find_spikes
from megatron_stable.stability.events import EarlyWarning
from megatron_stable.stability.growth import LEAST, History, Window, forecast
from megatron_stable.stability.probes import PROBES, places
from megatron_stable.stability.warning_rules import RULES, Rule
from megatron_stable.stability.warnings import Watch

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
    if part == "between":
        for seed in (11, 12):
            yield from (Run(part, False, "small", "baseline", rate, seed) for rate in (0.02, 0.05, 0.1))
            yield Run(part, False, "small", "peri_ln", 0.5, seed)
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


class Passing(NamedTuple):
    """A series that passes the threshold of a rule, and the interval foretold at half of the way there.

    Attributes:
        measured: Times that it was measured until then.
    """

    rule: str
    tag: str
    step: int
    measured: int
    low: float = inf
    high: float = inf

    @property
    def foretold(self) -> bool:
        """Whether there was an interval; without an end it is none."""
        return self.high < inf

    @property
    def held(self) -> bool:
        """Whether it holds the step."""
        return self.low <= self.step <= self.high < inf


class Seen(NamedTuple):
    """What a run's records come to: where the loss began to rise, if it does, what was said, and what was passed.

    Attributes:
        last: Mean loss of the last ten steps.
    """

    run: Run
    onset: int | None
    last: float
    warnings: list[EarlyWarning]
    passings: list[Passing]

    @property
    def lead(self) -> int:
        """Steps from the first warning to the onset; 0: there was none before it."""
        first = self.warnings[0].step if self.warnings else inf
        return self.onset - int(first) if self.onset is not None and first < self.onset else 0

    @property
    def share(self) -> float:
        """The same, of the steps to the onset."""
        return self.lead / self.onset if self.onset else 0.0

    def first(self, rule: str) -> int | None:
        """The step in which a rule first spoke."""
        return next((warning.step for warning in self.warnings if warning.rule == rule), None)


def look(run: Run, root: Path) -> Seen:
    """Read a run, and watch it as it was watched while it trained."""
    directory = RunDirectory(root / run.name / "run")
    config, records = load_config(directory.config), latest(read_metrics(directory.metrics))
    own = config.guard.model_dump(include={"window", "warmup", "threshold", "patience", "drift"})
    losses = [nan if record["loss"] is None else record["loss"] for record in records]
    spikes = find_spikes([record["step"] for record in records], losses, replace(LOSS, **own))
    onset = next((spike.onset for spike in spikes if spike.kind in ("rise", "divergence")), None)
    watch = Watch(config)
    warnings = [warning for record in records for warning in watch.update(record["step"], record)]
    columns = [column for column in watch.columns if column.rule.kind == "reaches"]
    passings = [passing(column.rule, column.tag, config, records) for column in columns]
    return Seen(run, onset, fmean(losses[-10:]), warnings, [each for each in passings if each is not None])


def passing(rule: Rule, tag: str, config: Config, records: list[Record]) -> Passing | None:
    """When a series passed its threshold, for two measurements at least, and what half of the way there foretold."""

    def scaled(value: float) -> float:
        return abs(value) if rule.linear else (-1 if rule.falls else 1) * log(max(value, 1e-30))

    values = [(record["step"], scaled(record[tag])) for record in records if record.get(tag) is not None]
    target = scaled(rule.limit(config))
    passed = next((a[0] for a, b in pairwise(values) if a[1] >= target and b[1] >= target), None)
    if passed is None:
        return None
    history, windows = History(1), dict[int, Window]()
    half = [(step, value) for step, value in values if step <= passed / 2]
    for step, value in half:
        windows |= {window.pace: window for window in history.add(step, np.array([value]))}
    seen = [forecast(window, np.array([target])) for window in windows.values()]
    soonest = min(seen, key=lambda one: float(one.at[0]), default=None)
    if soonest is None:
        return Passing(rule.name, tag, passed, len(half))
    return Passing(rule.name, tag, passed, len(half), float(soonest.low[0]), float(soonest.high[0]))


def report(seen: list[Seen]) -> dict[str, tuple[int, int]]:
    """Print what the runs came to; by rule: runs in which it was right, and those in which it spoke, but for late."""
    print("\n| recipe | rate | size | runs | loss rises | runs with warnings | last loss |\n|" + 7 * "---|")
    for kind in sorted({(each.run.healthy, each.run.recipe, each.run.rate, each.run.size) for each in seen}):
        group = [each for each in seen if (each.run.healthy, *each.run[3:5], each.run.size) == kind]
        rises, warned = sum(each.onset is not None for each in group), sum(bool(each.warnings) for each in group)
        last = median(each.last for each in group)
        print(f"| `{kind[1]}` | {kind[2]} | {kind[3]} | {len(group)} | {rises} | {warned} | {last:.2f} |")
    rose = [each for each in seen if not each.run.healthy and each.onset is not None]
    print(f"\nhigh rates: the loss rises in {len(rose)} of {sum(not each.run.healthy for each in seen)} runs")
    print("least, quartiles, most: onset at step", end=" ")
    print(f"{quantiles([each.onset or 0 for each in rose])}")
    print(f"lead in steps {quantiles([each.lead for each in rose])}")
    print(f"lead in % of the steps to the onset {quantiles([100 * each.share for each in rose])}")
    print(f"at least 20 %: in {sum(each.share >= 0.2 for each in rose)} of {len(rose)}")
    healthy = [each for each in seen if each.run.healthy]
    print(f"healthy: warnings in {sum(bool(each.warnings) for each in healthy)} of {len(healthy)} runs")
    for each in healthy:
        for warning in each.warnings:
            print(f"    {each.run.name}: {warning.sentence()}")
    print(
        "\n| rule | right | in vain | late | lead, median % | foretold at half of the way, and held |\n|" + 6 * "---|"
    )
    track = {rule.name: report_rule(rule.name, seen) for rule in RULES}
    passings = [one for each in seen for one in each.passings]
    enough = [one for one in passings if one.measured >= 2 * LEAST]
    foretold = [one for one in enough if one.foretold]
    print(f"\nseries that passed a threshold: {len(passings)}; at half of the way there")
    print(f"    measured often enough for a fit: {len(enough)}; with an interval that has an end: {len(foretold)};")
    lengths = quantiles([100 * (one.high - one.low) / one.step for one in foretold])
    print(f"    which holds the step: {sum(one.held for one in foretold)}; its length in % of the way {lengths}")
    short = [one for one in foretold if one.high - one.low <= one.step]
    print(f"    no longer than the way: {len(short)}, of which {sum(one.held for one in short)} hold the step")
    report_said(seen)
    return {name: counts for name, counts in track.items() if counts[1]}


def report_rule(rule: str, seen: list[Seen]) -> tuple[int, int]:
    """A row of the table."""
    first = [(step, each.onset) for each in seen if (step := each.first(rule)) is not None]
    leads = [(onset - step) / onset for step, onset in first if onset is not None and step < onset]
    vain = sum(onset is None for _, onset in first)
    foretold = [one for each in seen for one in each.passings if one.rule == rule and one.foretold]
    cells = (
        len(leads), vain, len(first) - len(leads) - vain, f"{100 * median(leads):.0f}" if leads else "–",
        f"{len(foretold)}, {sum(one.held for one in foretold)}" if foretold else "–",
    )  # fmt: skip
    print(f"| `{rule}` | " + " | ".join(map(str, cells)) + " |")
    return len(leads), len(leads) + vain


def report_said(seen: list[Seen]) -> None:
    """Of the steps that warnings foretold: how many came, and within the interval."""
    came = never = held = 0
    for each in seen:
        steps = {(one.rule, one.tag): one.step for one in each.passings}
        for warning in each.warnings:
            if warning.interval is not None:
                step = steps.get((warning.rule, warning.tag))
                came, never = came + (step is not None), never + (step is None)
                held += step is not None and warning.interval[0] <= step <= warning.interval[1]
    print(f"warnings that foretold a step: {came + never}; of {came} the series passed, in {held} within the interval")


def quantiles(values: Sequence[float]) -> str:
    """Least, quartiles and most."""
    return ", ".join(f"{x:.0f}" for x in np.quantile(values, (0, 0.25, 0.5, 0.75, 1))) if len(values) else "–"


def write(track: dict[str, tuple[int, int]]) -> None:
    """Put the numbers into the package."""
    path = Path(track_record.__file__)
    head = path.read_text(encoding="utf-8").partition("TRACK_RECORD")[0]
    lines = "".join(f"    {name!r}: {pair},\n".replace("'", '"') for name, pair in track.items())
    path.write_text(f"{head}TRACK_RECORD: dict[str, tuple[int, int]] = {{\n{lines}}}\n", encoding="utf-8")


def cost(layers: int = 48, measured: int = 500) -> None:
    """Print what a measured step costs the watch of a large model, with whatever else the machine does."""
    config = load_config(
        None, ["model.size=10b", f"model.layers={layers}", "model.vocab_size=512", "run.steps=1000000"]
    )
    tags = [where.tag for probe in PROBES.values() for where in places(probe, layers)]
    watch, draw, seconds = Watch(config), np.random.default_rng(0), []
    for step in range(10, 10 * measured, 10):
        values = np.exp(0.05 * draw.standard_normal(len(tags)))
        record = {"learning_rate": 1e-3} | dict(zip(tags, values.tolist(), strict=True))
        began = process_time()
        watch.update(step, record)
        seconds.append(process_time() - began)
    print(
        f"{layers} layers, {len(watch.columns)} series: ms of processor time of a measured step; least, quartiles, most"
    )
    print(", ".join(f"{1000 * x:.1f}" for x in np.quantile(seconds, (0, 0.25, 0.5, 0.75, 1))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("tune", "held-out", "between"), default="held-out")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/early_warnings"))
    parser.add_argument("--write", action="store_true", help="put the numbers that warnings cite into the package")
    parser.add_argument("--cost", action="store_true", help="train nothing")
    args = parser.parse_args()
    if args.cost:
        cost()
        return
    if args.write and args.part != "held-out":
        parser.error("warnings cite the held-out runs: leave --part out")
    prepare(args.output)
    with ThreadPoolExecutor(args.jobs) as pool:
        trained = list(pool.map(lambda run: train(run, args.output), runs(args.part)))
    track = report([look(run, args.output) for run in trained])
    if args.write:
        write(track)


if __name__ == "__main__":
    main()
