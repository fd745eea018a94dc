"""The newcomer's run: from the text that every Python carries to a trained model, its curves and a sample.

Every step calls what the verb of its name calls, and is announced as the command that does the same.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_stable.config.checks import check
from megatron_stable.config.load import load_config
from megatron_stable.config.reference import commented_yaml
from megatron_stable.config.schema import Config
from megatron_stable.data import Tokenizer, preprocess, train_tokenizer
from megatron_stable.data.check import check_tokenizer
from megatron_stable.data.dataset import open_dataset
from megatron_stable.data.files import write_file
from megatron_stable.data.indexed import dataset_paths
from megatron_stable.engine.checkpoint import store
from megatron_stable.errors import DataError
from megatron_stable.training.demo_text import MOST_BYTES, write_standard_library
from megatron_stable.training.directory import RunDirectory
from megatron_stable.training.figure import draw, read_metrics
from megatron_stable.training.generation import Sampling, generate, need_tokenizer, text_pieces
from megatron_stable.training.launch import launch
from megatron_stable.training.trained import open_run

PROGRAM = "megatron-stable"
PROMPT, SAMPLE_TOKENS = "    def __init__(self", 120
BATCH = 8  # sequences
VALIDATION = 0.05  # of the documents
# fp32, because it is fast on every CPU: bf16 is 2.5 times as fast where the CPU has instructions for it, and
# several times slower where it has not
SETTINGS = (
    "model.size=tiny",
    "model.recipe=qk_norm",
    "precision.dtype=fp32",
    f"batch.global_size={BATCH}",
    "optimizer.learning_rate=4.0e-3",
    "schedule.min_learning_rate=2.0e-4",
    "schedule.warmup_steps=20",
    "run.steps=240",
    "evaluation.every=20",
    "evaluation.batches=4",
)


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
        vocab_size: Of the tokenizer.
        text_bytes: Of the standard library's source to use at most.
        say: Called with lines for the user.
    """

    directory: Path
    ranks: int = 2
    settings: Sequence[str] = SETTINGS
    vocab_size: int = 2048
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
        config = self._configure()
        code = self._train(config)
        if code:
            return code
        run = Path(config.run.directory)
        trained = newest_step(run)
        if not trained:
            self.say("\nStopped before the first checkpoint. The same command goes on from here.")
            return 0
        self._sample(run)
        self._draw(config, run)
        minutes, seconds = divmod(round(time.monotonic() - began), 60)
        if trained < config.run.steps:
            self.say(f"\nStopped after step {trained} of {config.run.steps}. The same command goes on from there.")
        self._explain(config, run, f"{minutes} min {seconds} s")
        return 0

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

    def _configure(self) -> Config:
        path = self.directory / "config.yaml"
        if not path.is_file():
            tensor = 2 if self.ranks % 2 == 0 else 1
            files = [
                f"run.directory={self.directory / 'run'}",
                f"data.tokenizer={self._tokenizer}",
                f"data.train={self._prefixes[0]}",
                f"data.validation={self._prefixes[1]}",
                f"parallel.tensor={tensor}",
                f"batch.micro_size={max(1, BATCH * tensor // self.ranks)}",
            ]
            config = load_config(None, [*files, *self.settings])
            check(config, self.ranks)
            write_file(path, commented_yaml(config).encode())
        config = load_config(path)
        check(config, self.ranks)
        return config

    def _train(self, config: Config) -> int:
        arguments = ["--config", str(self.directory / "config.yaml")]
        model = config.model
        self._announce(
            f"4. Training: {model.layers} layers x {model.hidden}, recipe {model.recipe}, on {self.ranks} rank(s) "
            f"with TP {config.parallel.tensor}; every setting is in {arguments[1]}",
            ["pretrain", *arguments, "--ranks", self.ranks],
        )
        trained = newest_step(config.run.directory)
        if trained >= config.run.steps:
            self.say(f"   is there already: {trained} steps")
            return 0
        return launch(arguments, self.ranks)

    def _sample(self, run: Path) -> None:
        command = ["generate", run, "--prompt", PROMPT, "--tokens", SAMPLE_TOKENS]
        self._announce("5. A sample: what the model takes for Python", command)
        trained = open_run(run)
        pieces = text_pieces(need_tokenizer(trained), PROMPT, generate(trained, PROMPT, SAMPLE_TOKENS, Sampling()))
        text = PROMPT + "".join(pieces)
        self.say("\n".join(f"   | {line}" for line in text.split("\n")))

    def _draw(self, config: Config, run: Path) -> None:
        records = read_metrics(RunDirectory(run).metrics)
        title = f"{config.model.layers} x {config.model.hidden}, {config.model.recipe}, on Python's standard library"
        draw({run.name: records}, self._figure, title)
        self.say(f"\n6. A figure of losses and gradient norm -> {self._figure}")
        losses = [record["validation_loss"] for record in records if record.get("validation_loss") is not None]
        if losses:
            self.say(f"   validation loss {losses[0]:.2f} -> {losses[-1]:.2f}")

    def _explain(self, config: Config, run: Path, duration: str) -> None:
        go_on = ["pretrain", "--config", self.directory / "config.yaml", "--ranks", self.ranks]
        own = ["init", "--size", "10m", "--recipe", "qk_norm_cap", "--output", "config.yaml"]
        self.say(
            f"\nDone in {duration}. What you can do now:\n"
            f"   look at the curves        {_command('tensorboard', '--logdir', RunDirectory(run).tensorboard)}\n"
            f"   train on                  {_command(PROGRAM, *go_on, f'run.steps={2 * config.run.steps}')}\n"
            f"   measure it                {_command(PROGRAM, 'evaluate', run)}\n"
            f"   begin with your own text  {_command(PROGRAM, *own)}"
        )

    def _announce(self, title: str, arguments: Sequence[object]) -> None:
        self.say(f"\n{title}\n   $ {_command(PROGRAM, *arguments)}")

    def _remove(self) -> None:
        if not self._text.is_file():  # then no demo was here, and what has such names is somebody's own
            return
        shutil.rmtree(self.directory / "run", ignore_errors=True)
        files = [self._tokenizer, self._figure, self.directory / "config.yaml"]
        files += [path for prefix in self._prefixes for path in dataset_paths(prefix)]
        for path in [*files, self._text]:
            path.unlink(missing_ok=True)

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
