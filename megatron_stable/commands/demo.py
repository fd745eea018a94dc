"""`megatron-stable demo`: a run that diverges and one that does not, in minutes, each step by the verb for it."""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

from megatron_stable.analysis.figure import Event as Mark
from megatron_stable.analysis.figure import draw
from megatron_stable.checkpoint import store
from megatron_stable.commands.app import run_verb
from megatron_stable.config.load import load_config
from megatron_stable.config.schema import Config
from megatron_stable.data.indexed import dataset_paths
from megatron_stable.data.standard_library import write_standard_library
from megatron_stable.errors import ConfigError, DivergenceError
from megatron_stable.launching.local import gpu_count
from megatron_stable.records.directory import RunDirectory
from megatron_stable.records.metrics import Record, read_metrics
from megatron_stable.stability.events import Event, GaveUp, Rollback, Stop

PROGRAM = "megatron-stable"
RECIPES = ("baseline", "qk_norm_cap")  # the one that diverges, and the one that does not and is sampled from
SETTINGS = (
    "model.size=tiny",
    "model.hidden=64",
    "model.sequence_length=64",
    "model.vocab_size=512",
    # on a CPU fp32 is always fast; bf16 is 2.5 times as fast where the CPU has instructions for it, and several times
    # slower where it has not
    "precision.dtype=fp32",
    "batch.global_size=64",  # many short sequences, so that the loss is smooth enough to see it rise
    "run.steps=130",
    "optimizer.learning_rate=0.5",  # far too high: 0.004 does well
    "schedule.min_learning_rate=0.002",
    "schedule.warmup_steps=100",  # both learn for a while before it is too high for one of them
    # a guard for a run of minutes: everything comes 2 to 10 times as soon as it would by default
    "guard.window=30",
    "guard.warmup=30",
    "guard.threshold=6",
    "guard.patience=8",
    "guard.drift=0.03",
    "guard.rollback_steps=10",
    "guard.skip_steps=30",
    "guard.max_rollbacks=2",
    "checkpoint.every=10",
    "checkpoint.healthy_after=10",
    "evaluation.every=65",
    "evaluation.batches=2",
)
VALIDATION = 0.05  # of the documents
DATA = ("train", "train_validation")  # the verb `preprocess` names the second after the first
PROMPT = "    def __init__(self"
AVERAGED = 10  # steps to a loss that is told
WIDTH = 110


def demo(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Fields to override, by dotted key.")
    ] = None,
    directory: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo"),
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks that train, with TP 2 if even. Default: 2, but 1 on a single GPU.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove what an earlier demo made, and start anew.")] = False,
) -> None:
    """Train the same small model twice, at a learning rate far too high: as it is, and with qk_norm_cap.

    The first diverges, and shows what the guard does about it; if the guard gives up, that is no failure of the demo.
    The second trains through. At the end: a sample of what it writes, and a figure of both.

    It needs no network: the text is the source of Python's standard library. The same command goes on where the last
    one stopped; --fresh starts anew.

    Example:
      megatron-stable demo
      megatron-stable demo --directory /tmp/demo --ranks 1 --fresh
    """
    began = time.monotonic()
    if fresh:
        remove(directory)
    config = prepare(directory, overrides or ())
    first, last = runs = [directory / recipe for recipe in RECIPES]
    for number, run in enumerate(runs, 5):
        train(f"{number}. Training: {run.name}", run, config, ranks or min(2, gpu_count() or 2))
    sample = ["generate", last, "--prompt", PROMPT]
    announce(f"7. A sample: what {last.name} takes for Python", sample)
    if code := run_verb([*map(str, sample)]):
        raise typer.Exit(code)
    figure = directory / "training.png"
    draw_runs(runs, config, figure)
    say(f"\n8. A figure of both runs: {figure}")
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    own = "init", "--size", "10m", "--recipe", last.name, "--output", "config.yaml"
    say(
        f"\nDone in {minutes} min {seconds} s. What you can do now:\n"
        f"   look at the curves        {typed('tensorboard', '--logdir', directory)}\n"
        f"   look inside the models    {typed(PROGRAM, 'report', *runs, '--output', directory / 'report.html')}\n"
        f"   read what happened        {RunDirectory(first).logbook}\n"
        f"   find the spikes           {typed(PROGRAM, 'spikes', first)}\n"
        f"   measure the model         {typed(PROGRAM, 'evaluate', last)}\n"
        f"   begin with your own text  {typed(PROGRAM, *own)}"
    )


def prepare(directory: Path, overrides: Sequence[str] = ()) -> Config:
    """Make text, configuration, tokenizer and data, as far as they are not there yet.

    Returns:
        The configuration, as read from ``directory/config.yaml``.

    Raises:
        ConfigError: The configuration is there, but with other values than ``overrides``.
        typer.Exit: A verb failed.
    """
    path, text, tokenizer = (directory / name for name in ("config.yaml", "text.jsonl", "tokenizer.model"))
    data, validation = (directory / name for name in DATA)
    own = f"data.tokenizer={tokenizer}", f"data.train={data}", f"data.validation={validation}"
    settings = [*own, *SETTINGS, *overrides]
    make("1. The configuration", [path], [], "init", "--output", path, *settings)
    config = load_config(path)
    if overrides and load_config(None, settings) != config:
        raise ConfigError(
            f"{path} was made with other settings: choose another --directory, or start anew with --fresh"
        )
    say("\n2. Text: the source of Python's standard library")
    if is_made([text], []):
        say(f"   {text} is there already")
    else:
        documents, size = write_standard_library(text)
        say(f"   {text}: {documents} files, {size / 1e6:.1f} MB")
    # fmt: off
    make(
        "3. A tokenizer", [tokenizer], [text],
        "tokenizer", "--input", text, "--vocab-size", config.model.vocab_size, "--output", tokenizer,
    )
    make(
        "4. Data: the text as token ids", [*dataset_paths(data), *dataset_paths(validation)], [text, tokenizer],
        "preprocess", "--input", text, "--tokenizer", tokenizer, "--output", data, "--validation-fraction", VALIDATION,
    )
    # fmt: on
    return config


def train(title: str, run: Path, config: Config, ranks: int) -> None:
    """Train the run of a recipe to its end, or until the guard gives it up, and say what became of it.

    Raises:
        typer.Exit: It failed, or was stopped.
    """
    tensor = 2 if ranks % 2 == 0 else 1
    micro = max(1, config.batch.global_size * tensor // ranks)
    # fmt: off
    words = [
        "pretrain", "--config", run.parent / "config.yaml", "--ranks", ranks, f"run.directory={run}",
        f"model.recipe={run.name}", f"parallel.tensor={tensor}", f"batch.micro_size={micro}",
    ]
    # fmt: on
    announce(title, words)
    if ended(run, config.run.steps):
        say(f"   {run} is there already")
    elif (code := run_verb([*map(str, words)])) and not gave_up(RunDirectory(run).ledger.read()):
        raise typer.Exit(code)
    elif not ended(run, config.run.steps):
        say(f"\nStopped at step {newest_step(run)} of {config.run.steps}. The same command goes on from here.")
        raise typer.Exit
    lowest, last = levels(attempts(run))
    say(f"   {run.name} {outcome(RunDirectory(run).ledger.read(), config.run.steps)}")
    say(f"   its training loss: {lowest:.2f} at its lowest, {last:.2f} at the end")


def ended(run: Path, steps: int) -> bool:
    """Whether a run has no step to make any more: it made them all, or the guard gave it up."""
    return newest_step(run) >= steps or gave_up(RunDirectory(run).ledger.read())


def newest_step(run: Path) -> int:
    """The step that a run would go on from."""
    return max((entry.step for entry in store.entries(RunDirectory(run).checkpoints) if entry.usable), default=0)


def gave_up(events: Sequence[Event]) -> bool:
    """Whether the guard has given the run up, and nothing was done to it since."""
    acts = [event for event in events if not isinstance(event, Stop)]
    return bool(acts) and isinstance(acts[-1], GaveUp)


def outcome(events: Sequence[Event], steps: int) -> str:
    """What became of a run that has ended, by its ledger, as what follows its name."""
    backs = [event.rollback_to for event in events if isinstance(event, Rollback) and event.by == "guard"]
    acts = [f"rolled back to step {step}" for step in backs]
    if gave_up(events):
        acts.append(f"gave up with exit code {DivergenceError.exit_code}, which is no failure of the demo")
        return f"diverged: the guard {', then '.join(acts)}"
    if backs:
        return f"diverged: the guard {', then '.join(acts)}, and the run went on to step {steps}"
    return f"reached step {steps} without a rollback"


def attempts(run: Path) -> list[list[Record]]:
    """What a run logged, in pieces: one begins wherever the run went back."""
    parts: list[list[Record]] = [[]]
    for line in read_metrics(RunDirectory(run).metrics):
        if parts[-1] and line["step"] <= parts[-1][-1]["step"]:
            parts.append([])
        parts[-1].append(line)
    return parts


def levels(parts: Iterable[Sequence[Record]]) -> tuple[float, float]:
    """Training loss in nats, as means of `AVERAGED` steps: the lowest, and the last. NaN: it was never finite."""
    losses = [line["loss"] for part in parts for line in part if line.get("loss") is not None]
    means = [fmean(losses[max(0, end - AVERAGED) : end]) for end in range(len(losses), 0, -AVERAGED)]
    return min(means, default=nan), means[0] if means else nan


def draw_runs(runs: Sequence[Path], config: Config, output: Path) -> None:
    """Draw training loss and gradient norm of runs, a curve for each attempt, and mark what the guard did."""
    curves, marks = {}, []
    for run in runs:
        for number, part in enumerate(attempts(run)):
            name = f"{run.name}, after rollback {number}" if number else run.name
            curves[name] = [{key: line.get(key) for key in ("step", "loss", "grad_norm")} for line in part]
        for event in RunDirectory(run).ledger.read():
            if isinstance(event, (Rollback, GaveUp)):
                marks.append(Mark(event.step, event.step, f"{run.name}: {event.event.replace('_', ' ')}"))
                if event.onset is not None:
                    marks.append(Mark(event.onset, event.onset, f"{run.name}: onset of a rise"))
    shape = f"{config.model.layers} x {config.model.hidden}"
    draw(curves, output, f"{shape} at learning rate {config.optimizer.learning_rate:g}, Python's source", marks)


def remove(directory: Path) -> None:
    """Remove what the demo made. Without its text no demo was here, and what has such names is somebody else's."""
    text = directory / "text.jsonl"
    if not text.is_file():
        return
    for recipe in RECIPES:
        shutil.rmtree(directory / recipe, ignore_errors=True)
    data = [path for name in DATA for path in dataset_paths(directory / name)]
    for path in [*data, *(directory / name for name in ("config.yaml", "tokenizer.model", "training.png")), text]:
        path.unlink(missing_ok=True)


def make(title: str, products: Sequence[Path], sources: Sequence[Path], *words: object) -> None:
    """Announce a verb, and run it if a product of it is missing or older than a source. typer.Exit: it failed."""
    announce(title, words)
    if is_made(products, sources):
        say(f"   {products[0]} is there already")
    elif code := run_verb([*map(str, words)]):
        raise typer.Exit(code)


def is_made(products: Iterable[Path], sources: Sequence[Path]) -> bool:
    """Whether all products are there, and none is older than a source."""
    newest = max((path.stat().st_mtime for path in sources), default=0.0)
    return all(path.is_file() and path.stat().st_mtime >= newest for path in products)


def announce(title: str, words: Sequence[object]) -> None:
    """Print what comes, and the command for it."""
    say(f"\n{title}\n   $ {typed(PROGRAM, *words)}")


def typed(program: str, *words: object) -> str:
    """A command line as one types it; a long one goes over several lines. Not on the PATH, the program is named by
    where this Python has it."""
    beside = Path(sys.executable).parent / program
    if shutil.which(program) is None and beside.is_file():
        relative = os.path.relpath(beside)
        program = str(beside) if relative.startswith("..") else relative
    lines = [program]
    for word in map(shlex.quote, map(str, words)):
        if len(lines[-1]) + len(word) < WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return " \\\n       ".join(lines)


def say(text: str) -> None:
    """Print, now: what the ranks print comes in between."""
    print(text, flush=True)
