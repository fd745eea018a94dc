"""The second opinion on real runs: states that fail, data that change, and both at once.

    python benchmarks/second_opinion.py                  # all of it, 10 seeds: half an hour on two cores
    python benchmarks/second_opinion.py --seeds 2 --parts state
    python benchmarks/second_opinion.py --output runs/second_opinion   # where runs are kept; goes on where it stopped

Small models on the source of Python's standard library (SentencePiece, 512 tokens), each run one rank and the verb
`pretrain` itself; what is counted is read from ledger and metrics.

state   `baseline` at a learning rate at which it diverges, and `qk_norm_cap` at the same: the first must be rolled
        back, the second must not.
data    `qk_norm` at a good learning rate, on English prose that becomes another kind of text at step 90, at once or
        over 40 steps: no rollback, and the shift on record where the loss rose.
both    data that damage the state: random tokens for 12 steps at a learning rate at which `baseline` does not come
        back; and a change of data with gradients of the wrong sign at the same time.
"""

from __future__ import annotations

import argparse
import base64
import codecs
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import numpy as np

from megatron_stable.data import Batches, Course, Tokenizer, open_dataset, preprocess, train_tokenizer
from megatron_stable.data.standard_library import write_standard_library

VOCAB, SEQUENCE, BATCH, CHANGE, BLEND, BAD = 512, 64, 64, 90, 40, 12
SIZES = {64: 0.5, 96: 0.5}  # width: a learning rate at which `baseline` diverges
SETTINGS = (
    f"model.sequence_length={SEQUENCE}", f"batch.global_size={BATCH}", f"batch.micro_size={BATCH}", "model.size=tiny",
    "precision.dtype=fp32", "schedule.kind=constant", "logging.tensorboard=false",
    # a guard for runs of a hundred steps
    "guard.window=30", "guard.warmup=30", "guard.threshold=6", "guard.patience=8", "guard.drift=0.03",
    "guard.rollback_steps=10", "guard.skip_steps=20", "guard.max_rollbacks=1", "checkpoint.every=10",
    "checkpoint.healthy_after=10", "checkpoint.keep=20",
)  # fmt: skip


class Run(NamedTuple):
    """A run: its part of the table, its name, its settings, what spoils its data, and its faults."""

    part: str
    name: str
    seed: int
    settings: tuple[str, ...]
    spoil: Callable[[np.ndarray, int, np.random.Generator], np.ndarray | None] | None = None
    faults: tuple[dict[str, Any], ...] = ()

    @property
    def directory(self) -> str:
        """Below the benchmark's."""
        return f"{self.part}/{re.sub('[^a-z0-9_]+', '-', self.name.lower())}-{self.seed}"


class Seen(NamedTuple):
    """What became of a run: ledger, and losses by step before it first went back."""

    run: Run
    ledger: list[dict[str, Any]]
    losses: dict[int, float]

    def steps(self, event: str) -> list[int]:
        """Where events of a kind are."""
        return [line["step"] for line in self.ledger if line["event"] == event]

    @property
    def lowest(self) -> int:
        """The step about which the mean of 15 losses is lowest, found without the guard."""
        means = self._means()
        return min(means, key=lambda step: means[step])

    @property
    def onset(self) -> int:
        """The last step about which that mean is the lowest still, to two standard errors: a plateau is no rise."""
        means, lowest = self._means(), self.lowest
        error = stdev(self.losses[k] for k in range(lowest - 7, lowest + 8)) / 15**0.5
        return max(step for step, mean in means.items() if mean <= means[lowest] + 2 * error)

    def _means(self) -> dict[int, float]:
        steps = sorted(self.losses)
        return {s: fmean(self.losses[k] for k in range(s - 7, s + 8)) for s in steps[7:-7]}


def kinds_of_text(tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Tokens of other texts, by what they are."""
    root, include = Path(sysconfig.get_paths()["stdlib"]), Path(sysconfig.get_paths()["include"])
    sources = "\n".join(path.read_text("utf-8", "ignore") for path in sorted(root.glob("*.py")))
    prose = "\n".join(re.findall(r'"""(.*?)"""', sources, re.DOTALL))
    headers = "\n".join(path.read_text("utf-8", "ignore") for path in sorted(include.rglob("*.h")))
    drawn = np.random.default_rng(0).bytes(300_000)
    texts = {
        "prose": prose[:60_000],  # soon known well, so that all else is harder
        "Python": sources,
        "C": headers or codecs.encode(sources, "rot13"),
        "another language (rot13 of English)": codecs.encode(prose, "rot13"),
        "harder: base64 of random bytes": base64.b64encode(drawn).decode(),
        "easier: one sentence again and again": "All work and no play makes Jack a dull boy.\n" * 5000,
    }
    return {name: np.array(tokenizer.encode(text[:400_000]), np.uint16) for name, text in texts.items()}


def cut(tokens: np.ndarray) -> Callable[[np.random.Generator], np.ndarray]:
    """Samples of a text."""
    return lambda draw: tokens[(at := draw.integers(len(tokens) - SEQUENCE)) : at + SEQUENCE]


def changed(
    first: np.ndarray, then: np.ndarray, blend: int
) -> Callable[[np.ndarray, int, np.random.Generator], np.ndarray | None]:
    """One text, and another from step CHANGE on, at once or more and more over ``blend`` steps."""
    before, after = cut(first), cut(then)

    def spoil(old: np.ndarray, step: int, draw: np.random.Generator) -> np.ndarray | None:
        share = (step - CHANGE + 1) / blend if blend else float(step >= CHANGE)
        return after(draw) if draw.random() < share else before(draw)

    return spoil


def garbage(old: np.ndarray, step: int, draw: np.random.Generator) -> np.ndarray | None:
    """Random tokens for a few steps."""
    return draw.integers(0, VOCAB, SEQUENCE) if CHANGE <= step < CHANGE + BAD else None


def runs(seeds: int, texts: dict[str, np.ndarray]) -> Iterator[Run]:
    """All of them."""
    for width, rate in SIZES.items():
        for recipe in ("baseline", "qk_norm_cap"):
            for seed in range(1, seeds + 1):
                own = (f"model.hidden={width}", f"model.recipe={recipe}", f"optimizer.learning_rate={rate}")
                yield Run(
                    "state", f"{recipe} width {width}", seed, (*own, "schedule.warmup_steps=100", "run.steps=120")
                )
    good = ("model.hidden=64", "model.recipe=qk_norm", "schedule.warmup_steps=20", "run.steps=160")
    prose = texts["prose"]
    for number, (name, tokens) in enumerate(texts.items()):
        for blend in (0, BLEND) if number else ():
            how = f"{name}, {'blended in' if blend else 'abrupt'}"
            yield Run("data", how, number, (*good, "optimizer.learning_rate=0.005"), changed(prose, tokens, blend))
    bad = ("model.hidden=64", "model.recipe=baseline", "schedule.warmup_steps=20", "run.steps=120")
    for seed in range(1, seeds // 2 + 1):
        yield Run("both", "garbage", seed, (*bad, "optimizer.learning_rate=0.03"), garbage)
        ascent = {"kind": "scale_gradient", "data_steps": [CHANGE, CHANGE + 3], "factor": -30.0}
        shift = changed(prose, texts["Python"], 0)
        yield Run("both", "Python and ascent", seed, (*good, "optimizer.learning_rate=0.005"), shift, (ascent,))


def write_data(source: Path, prefix: Path, run: Run) -> None:
    """A copy of the data in which the samples of a run's data steps are spoiled."""
    for suffix in (".bin", ".idx", ".meta.json"):
        shutil.copy(source.with_name(source.name + suffix), prefix.with_name(prefix.name + suffix))
    if run.spoil is None:
        return
    dataset, draw = open_dataset(str(prefix), SEQUENCE, run.seed), np.random.default_rng(run.seed)
    batches, tokens = Batches(dataset, Course.begin(BATCH), BATCH), np.memmap(f"{prefix}.bin", np.uint16, "r+")
    for step in range(1, 400):
        for k in batches.samples(step):
            start = dataset.locate(k).start
            new = run.spoil(tokens[start : start + SEQUENCE], step, draw)
            if new is not None:
                tokens[start : start + SEQUENCE] = new
    tokens.flush()


def train(run: Run, root: Path) -> Seen:
    """Do a run, unless it is there."""
    directory = root / run.directory
    done = directory / "done.json"
    if not done.is_file():
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        prefix = directory / "data"
        write_data(root / "train", prefix, run)
        (directory / "config.yaml").write_text(f"run: {{directory: {directory / 'run'}}}\n")
        data = (f"data.train={prefix}", f"data.tokenizer={root / 'tok.model'}")
        verb = (sys.executable, "-m", "megatron_stable", "pretrain", "--config", str(directory / "config.yaml"))
        command = [*verb, *SETTINGS, *run.settings, f"run.seed={run.seed}", *data]
        faults = {"MEGATRON_STABLE_FAULTS": json.dumps(run.faults)}
        printed = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1", **faults}, capture_output=True, text=True, check=False
        )
        if printed.returncode not in (0, 3):
            raise SystemExit(f"{run.directory}: exit code {printed.returncode}\n{printed.stdout}\n{printed.stderr}")
        ledger = [json.loads(line) for line in (directory / "run/ledger.jsonl").read_text().splitlines()]
        losses: dict[int, float] = {}
        for line in map(json.loads, (directory / "run/metrics.jsonl").read_text().splitlines()):
            if line["step"] in losses:
                break  # it went back
            losses[line["step"]] = line["loss"] if line["loss"] is not None else 99.0
        done.write_text(json.dumps({"ledger": ledger, "losses": losses}))
        for path in directory.glob("data.*"):
            path.unlink()
        shutil.rmtree(directory / "run/checkpoints")
    found = json.loads(done.read_text())
    return Seen(run, found["ledger"], {int(step): loss for step, loss in found["losses"].items()})


def table(part: str, seen: list[Seen]) -> None:
    """What the runs of a part came to, by name."""
    print(f"\n| {part} | runs | rolled back | steps from onset, median (most) | from the lowest mean", end="")
    print(" | opinions | rise, nats | gap, nats | healthy gap / rise (least, most) |\n|" + 9 * "---|")
    for name in dict.fromkeys(each.run.name for each in seen):
        group = [each for each in seen if each.run.name == name]
        back = [each for each in group if each.steps("rollback") or each.steps("gave_up")]
        first = [(each, (each.steps("rollback") or each.steps("gave_up"))[0]) for each in back]
        asked = [line for each in group for line in each.ledger if line["event"] == "second_opinion"]
        said = ", ".join(f"{sum(a['verdict'] == v for a in asked)} {v}" for v in ("state", "data", "undecided"))
        onset, lowest = (
            [step - origin for step, origin in places]
            for places in ([(step, each.onset) for each, step in first], [(step, each.lowest) for each, step in first])
        )
        late = " | ".join(f"{median(steps):.0f} ({max(steps)})" if steps else "–" for steps in (onset, lowest))
        rise, gap = (f"{median([a[key] for a in asked]):.2f}" if asked else "–" for key in ("rise", "gap"))
        healthy = [a["healthy_gap"] / a["rise"] for a in asked if a.get("healthy_gap") is not None]
        part_of = f"{median(healthy):.2f} ({min(healthy):.2f}, {max(healthy):.2f})" if healthy else "–"
        print(f"| {name} | {len(group)} | {len(back)} | {late} | {said} | {rise} | {gap} | {part_of} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--parts", nargs="+", default=["state", "data", "both"])
    parser.add_argument("--output", type=Path, default=Path("runs/second_opinion"))
    args = parser.parse_args()
    root: Path = args.output
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "train.idx").is_file():
        write_standard_library(root / "text.jsonl")
        train_tokenizer([root / "text.jsonl"], VOCAB, root / "tok.model")
        preprocess([root / "text.jsonl"], root / "tok.model", root / "train")
    wanted = [run for run in runs(args.seeds, kinds_of_text(Tokenizer(root / "tok.model"))) if run.part in args.parts]
    with ThreadPoolExecutor(args.jobs) as pool:
        seen = []
        for each in pool.map(lambda run: train(run, root), wanted):
            seen.append(each)
            back = sorted(each.steps("rollback") + each.steps("gave_up"))
            asked = [(a["step"], a["verdict"]) for a in each.ledger if a["event"] == "second_opinion"]
            print(
                f"{each.run.directory}: lowest {each.lowest}, onset {each.onset}, asked {asked}, back at {back}",
                flush=True,
            )
    for part in args.parts:
        table(part, [each for each in seen if each.run.part == part])


if __name__ == "__main__":
    main()
