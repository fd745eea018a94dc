"""The newcomer's runs: the same model twice at a high learning rate, as it is and with qk_norm_cap.

From the text that every Python carries to a run that falls over and is rolled back, one that trains through, the curves
of both and a sample. Every step calls what the verb of its name calls, and is announced as the command that does the
same; what is said of a run is read from its ledger and its metrics.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from statistics import fmean

from megatron_stable.analysis.figure import Event, draw, read_metrics
from megatron_stable.analysis.generation import Sampling, generate, need_tokenizer, text_pieces
from megatron_stable.analysis.trained import open_run
from megatron_stable.checkpoint import store
from megatron_stable.config.checks import check
from megatron_stable.config.load import load_config
from megatron_stable.config.reference import commented_yaml
from megatron_stable.config.schema import Config
from megatron_stable.data import Tokenizer, preprocess, train_tokenizer
from megatron_stable.data.check import check_tokenizer
from megatron_stable.data.dataset import open_dataset
from megatron_stable.data.indexed import dataset_paths
from megatron_stable.data.standard_library import MOST_BYTES, write_standard_library
from megatron_stable.errors import DataError, DivergenceError
from megatron_stable.files import write_file
from megatron_stable.records.directory import RunDirectory
from megatron_stable.records.ledger import read_lines
from megatron_stable.training.callbacks import Record
from megatron_stable.training.launch import launch

PROGRAM = "megatron-stable"
RECIPES = ("baseline", "qk_norm_cap")  # the one that falls over, the one that does not and is shown at work
GAVE_UP = DivergenceError.exit_code
PROMPT, SAMPLE_TOKENS = "    def __init__(self", 200
BATCH = 64  # sequences: many short ones, so that the loss is smooth enough to see it rise
VALIDATION = 0.05  # of the documents
# fp32, because it is fast on every CPU: bf16 is 2.5 times as fast where the CPU has instructions for it, and
# several times slower where it has not
SETTINGS = (
    "model.size=tiny",
    "model.hidden=128",
    "model.sequence_length=64",
    "precision.dtype=fp32",
    "run.steps=240",
    "optimizer.learning_rate=0.24",  # far too high: 0.004 does well
    "schedule.min_learning_rate=0.002",
    "schedule.warmup_steps=160",  # both learn for a while before it is too high for one of them
    # a guard for a run of minutes: everything comes 3 to 10 times as soon as it would by default
    "guard.window=30",
    "guard.warmup=30",
    "guard.threshold=6",
    "guard.patience=50",
    "guard.drift=0.1",
    "guard.rollback_steps=20",
    "guard.skip_steps=40",
    "guard.max_rollbacks=2",
    "checkpoint.every=20",
    "checkpoint.healthy_after=20",
    "evaluation.every=40",
    "evaluation.batches=2",
)
ROSE = 1.05  # times the lowest loss: it has not merely wavered


def say(text: str) -> None:
    """Print, now: what the ranks print comes in between."""
    print(text, flush=True)


@dataclass(frozen=True)
class Demo:
    """What the demo makes.

    Attributes:
        directory: Where all of it goes.
        ranks: Processes that train; an even number of them is tensor parallel in pairs.
        settings: The configuration, as overrides.
        batch: Sequences per step.
        vocab_size: Of the tokenizer.
        text_bytes: Of the standard library's source to use at most.
        say: Called with lines for the user.
    """

    directory: Path
    ranks: int = 2
    settings: Sequence[str] = SETTINGS
    batch: int = BATCH
    vocab_size: int = 512
    text_bytes: int = MOST_BYTES
    say: Callable[[str], None] = say

    def __call__(self, fresh: bool = False) -> int:
        """Make what is not there yet, and show it.

        Args:
            fresh: Remove what an earlier demo left in the directory first.

        Returns:
            The exit code: 0, or that of training if it failed.

        Raises:
            MegatronStableError: A step failed.
        """
        began = time.monotonic()
        if fresh:
            self._remove()
        self._prepare_text()
        self._train_tokenizer()
        self._preprocess()
        runs = [(recipe, self._configure(recipe)) for recipe in RECIPES]
        for number, (recipe, config) in enumerate(runs, 4):
            code = self._train(number, recipe, config)
            if code not in (0, GAVE_UP):
                return code
            run, steps = Path(config.run.directory), config.run.steps
            trained = newest_step(run)
            if code == 0 and trained < steps:
                self.say(f"\nStopped at step {trained} of {steps}. The same command goes on from here.")
                return 0
            self.say(f"   {outcome(recipe, run, steps)}")
        self._sample(run)
        self._draw(runs)
        minutes, seconds = divmod(round(time.monotonic() - began), 60)
        self._explain(runs, f"{minutes} min {seconds} s")
        return code

    def _prepare_text(self) -> None:
        self.say(f"1. Text: the source of Python's standard library -> {self._text}")
        if self._text.is_file():
            self.say("   is there already")
        else:
            documents, size = write_standard_library(self._text, self.text_bytes)
            self.say(f"   {documents} files, {size / 1e6:.1f} MB")

    def _train_tokenizer(self) -> None:
        self._announce(
            "2. Tokenizer: SentencePiece",
            ["tokenizer", "--input", self._text, "--vocab-size", self.vocab_size, "--output", self._tokenizer],
        )
        if self._tokenizer.is_file():
            self.say(f"   is there already: {Tokenizer(self._tokenizer).vocab_size} tokens")
        else:
            summary = train_tokenizer([self._text], self.vocab_size, self._tokenizer)
            self.say(f"   {summary.vocab_size} tokens")

    def _preprocess(self) -> None:
        # fmt: off
        self._announce("3. Data: text to token ids, some documents for validation", [
            "preprocess", "--input", self._text, "--tokenizer", self._tokenizer, "--output", self._data,
            "--validation-fraction", VALIDATION,
        ])
        # fmt: on
        tokens = self._tokens_there()
        if tokens:
            self.say(f"   is there already: {tokens:,} tokens")
        else:
            summary = preprocess([self._text], self._tokenizer, self._data, validation_fraction=VALIDATION)
            self.say(f"   {summary.tokens:,} tokens in {summary.documents} documents")

    def _tokens_there(self) -> int:
        """Tokens of the datasets if both are there, whole, and made with the tokenizer; else 0."""
        try:
            found = [open_dataset(prefix, sequence_length=1, seed=0) for prefix in self._prefixes]
            for dataset in found:
                check_tokenizer(dataset, Tokenizer(self._tokenizer))
        except DataError:
            return 0
        return sum(part.indexed.tokens for dataset in found for part in dataset.parts)

    def _configure(self, recipe: str) -> Config:
        path = self._config(recipe)
        if not path.is_file():
            tensor = 2 if self.ranks % 2 == 0 else 1
            own = [
                f"run.directory={self._run(recipe)}",
                f"model.recipe={recipe}",
                f"data.tokenizer={self._tokenizer}",
                f"data.train={self._prefixes[0]}",
                f"data.validation={self._prefixes[1]}",
                f"parallel.tensor={tensor}",
                f"batch.global_size={self.batch}",
                f"batch.micro_size={max(1, self.batch * tensor // self.ranks)}",
            ]
            config = load_config(None, [*own, *self.settings])
            check(config, self.ranks)
            write_file(path, commented_yaml(config).encode())
        config = load_config(path)
        check(config, self.ranks)
        return config

    def _train(self, number: int, recipe: str, config: Config) -> int:
        """0, the exit code of training, or that of an earlier call if it gave up then."""
        arguments = ["--config", str(self._config(recipe))]
        model = config.model
        self._announce(
            f"{number}. Training with recipe {recipe}: {model.layers} layers x {model.hidden}, learning rate "
            f"{config.optimizer.learning_rate:g}, on {self.ranks} rank(s) with TP {config.parallel.tensor}; every "
            f"setting is in {arguments[1]}",
            ["pretrain", *arguments, "--ranks", self.ranks],
        )
        run = Path(config.run.directory)
        if gave_up(run):
            self.say("   is there already")
            return GAVE_UP
        if (trained := newest_step(run)) >= config.run.steps:
            self.say(f"   is there already: {trained} steps")
            return 0
        return launch(arguments, self.ranks)

    def _sample(self, run: Path) -> None:
        command = ["generate", run, "--prompt", PROMPT, "--tokens", SAMPLE_TOKENS]
        self._announce(f"6. A sample: what the {RECIPES[-1]} model takes for Python", command)
        trained = open_run(run)
        pieces = text_pieces(need_tokenizer(trained), PROMPT, generate(trained, PROMPT, SAMPLE_TOKENS, Sampling()))
        text = PROMPT + "".join(pieces)
        self.say("\n".join(f"   | {line}" for line in text.split("\n")))

    def _draw(self, runs: Sequence[tuple[str, Config]]) -> None:
        curves: dict[str, list[Record]] = {}
        events: list[Event] = []
        for recipe, config in runs:
            directory = RunDirectory(config.run.directory)
            parts = attempts(read_lines(directory.metrics))
            names = [recipe] + [f"{recipe}, after rollback {n}" for n in range(1, len(parts))]
            curves |= zip(names, parts, strict=True)
            events += [event._replace(label=f"{recipe}: {event.label}") for event in marks(directory.ledger.read())]
        model, rate = config.model, config.optimizer.learning_rate
        draw(
            curves, self._figure, f"{model.layers} x {model.hidden} at learning rate {rate:g}, Python's source", events
        )
        self.say(f"\n7. A figure of both, with what happened -> {self._figure}")
        for recipe, config in runs:
            lowest, end = lowest_and_end(Path(config.run.directory))
            self.say(f"   {recipe}: training loss {lowest:.2f} at its lowest, {end:.2f} at the end")

    def _explain(self, runs: Sequence[tuple[str, Config]], duration: str) -> None:
        first, last = (Path(config.run.directory) for _, config in (runs[0], runs[-1]))
        own = ["init", "--size", "10m", "--recipe", "qk_norm_cap", "--output", "config.yaml"]
        self.say(
            f"\nDone in {duration}. What you can do now:\n"
            f"   look at the curves        {_command('tensorboard', '--logdir', self.directory)}\n"
            f"   read what happened        {RunDirectory(first).logbook}\n"
            f"   find the spikes           {_command(PROGRAM, 'spikes', first)}\n"
            f"   measure the model         {_command(PROGRAM, 'evaluate', last)}\n"
            f"   begin with your own text  {_command(PROGRAM, *own)}"
        )

    def _announce(self, title: str, arguments: Sequence[object]) -> None:
        self.say(f"\n{title}\n   $ {_command(PROGRAM, *arguments)}")

    def _remove(self) -> None:
        if not self._text.is_file():  # then no demo was here, and what has such names is somebody's own
            return
        for recipe in RECIPES:
            shutil.rmtree(self._run(recipe), ignore_errors=True)
        files = [self._tokenizer, self._figure, *map(self._config, RECIPES)]
        files += [path for prefix in self._prefixes for path in dataset_paths(prefix)]
        for path in [*files, self._text]:
            path.unlink(missing_ok=True)

    def _config(self, recipe: str) -> Path:
        return self.directory / f"{recipe}.yaml"

    def _run(self, recipe: str) -> Path:
        return self.directory / recipe

    @property
    def _text(self) -> Path:
        return self.directory / "text.jsonl"

    @property
    def _tokenizer(self) -> Path:
        return self.directory / "tokenizer.model"

    @property
    def _data(self) -> Path:
        return self.directory / "train"

    @property
    def _prefixes(self) -> tuple[Path, Path]:
        return self._data, self._data.with_name(f"{self._data.name}_validation")

    @property
    def _figure(self) -> Path:
        return self.directory / "training.png"


def gave_up(run: Path) -> bool:
    """Whether the guard has given the run up, and nobody has touched it since."""
    events = [event.get("event") for event in RunDirectory(run).ledger.read()]
    return "gave_up" in events[-2:] and events[-1] in ("gave_up", "stop")


def outcome(recipe: str, run: Path, steps: int) -> str:
    """How a run ended, in words, by its ledger and its losses."""
    events = RunDirectory(run).ledger.read()
    found = [event.get("event") for event in events if event.get("series") == "loss"]
    backs = sum(event.get("event") == "rollback" and event.get("by") == "guard" for event in events)
    tried = f"after {backs} rollback{'s' * (backs != 1)} with other data" if backs else "with nothing tried"
    if gave_up(run):
        return (
            f"{recipe} diverged, and {tried} the guard gave up: exit code {GAVE_UP}, which says that\n"
            "   training cannot go on like this. It is what became of this run, no failure of the demo."
        )
    lowest, end = lowest_and_end(run)
    if end > ROSE * lowest:
        told = f"diverged; {tried} it" if backs or "divergence" in found else "was never found to diverge, yet"
        return f"{recipe} {told} reached step {steps} with a loss that has risen from {lowest:.2f} to {end:.2f}"
    if backs:
        return f"{recipe} diverged; {tried} it held on to step {steps}"
    if "divergence" in found:
        return f"{recipe} diverged, but came back by itself: {steps} steps"
    if "shift" in found:
        return f"{recipe} reached step {steps}; its loss moved to another level once"
    spikes = found.count("spike")
    told = f"{spikes} spike{'s' * (spikes != 1)} of the loss, which fell back" if spikes else "no spike of the loss"
    return f"{recipe} trained through: {steps} steps, {told}"


def lowest_and_end(run: Path) -> tuple[float, float]:
    """Training loss, as means over 10 steps: where it was lowest, and at the end. NaN: never finite."""
    losses = [record["loss"] for record in read_metrics(RunDirectory(run).metrics) if record.get("loss") is not None]
    means = [fmean(losses[max(last - 10, 0) : last]) for last in range(len(losses), 0, -10)]
    return (min(means), means[0]) if means else (nan, nan)


def attempts(lines: Iterable[Record]) -> list[list[Record]]:
    """Steps, training losses and gradient norms of a run in pieces: one begins where the run went back."""
    parts: list[list[Record]] = [[]]
    for line in lines:
        if parts[-1] and line["step"] <= parts[-1][-1]["step"]:
            parts.append([])
        parts[-1].append({key: line.get(key) for key in ("step", "loss", "grad_norm")})
    return [part for part in parts if part]


def marks(events: Iterable[Record]) -> list[Event]:
    """What to mark in the figure, from a ledger."""
    found = []
    for event in events:
        kind, onset = event.get("event"), event.get("onset")
        if kind in ("rollback", "gave_up"):
            found.append(Event(int(event["step"]), int(event["step"]), kind.replace("_", " ")))
        if onset and (kind in ("rollback", "gave_up") or (event.get("series") == "loss" and kind != "spike_end")):
            found.append(Event(int(onset), int(onset), "onset of a rise"))
    return list(dict.fromkeys(found))


def newest_step(run: str | Path) -> int:
    """The step of the newest usable checkpoint of a run, 0 if there is none."""
    usable = [entry.step for entry in store.entries(Path(run) / "checkpoints") if entry.usable]
    return usable[-1] if usable else 0


def _command(program: str, *arguments: object) -> str:
    """A command line as the user can type it: the program is found on the PATH, or beside this Python."""
    beside = Path(sys.executable).parent / program
    if shutil.which(program) is None and beside.is_file():
        relative = os.path.relpath(beside)
        program = str(beside) if relative.startswith("..") else relative
    return shlex.join([program, *map(str, arguments)])
