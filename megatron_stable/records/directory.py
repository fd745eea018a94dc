"""A run's directory: where things are in it, and whether it belongs to the run that wants it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from megatron_stable.config.load import dump_config, load_config, replaced
from megatron_stable.config.schema import Config
from megatron_stable.config.surgery import FREE
from megatron_stable.disk import patiently
from megatron_stable.errors import ConfigError
from megatron_stable.files import partial, replace_file, write_partial
from megatron_stable.persisted import package_version, read_json, refuse_unknown_format
from megatron_stable.records.interventions import read_interventions
from megatron_stable.records.ledger import Ledger
from megatron_stable.records.logbook import render
from megatron_stable.records.owner import LOCK, Claim, end_at_once
from megatron_stable.stability.events import Event

# what only says where and how often to write
SILENT = {"logging", "checkpoint"}
FORMAT, VERSION = "format.json", 1  # of the directory: names and contents of its files, checkpoints aside


class RunDirectory:
    """The directory that names a run. Only rank 0 writes to it, but for the checkpoints."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.ledger = Ledger(self.path / "ledger.jsonl")
        self.logbook = self.path / "logbook.md"
        self._claim: Claim | None = None

    @property
    def token(self) -> str | None:
        """Of this process's claim."""
        return self._claim.me.token if self._claim else None

    def log(self, event: Event) -> None:
        """Put an event into the ledger, and the ledger into the logbook. OSError: it cannot be written."""
        self.ledger.write(event)
        self.tell()

    def tell(self) -> None:
        """Write the logbook. OSError: it cannot be written."""
        self.logbook.write_text(render(self.ledger.read()), encoding="utf-8")

    def claim(self, config: Config) -> None:
        """Make the directory this process's, and see that it can be written to. What a run is goes there later, by
        :meth:`commit`, when all that can be wrong with its input has been looked at.

        Raises:
            ConfigError: It cannot be written to, is in use, or belongs to a run of another model.
            FormatError: A newer version of the program wrote it.
        """
        require_known_format(self.path)
        if self.config.is_file() and self.metrics.is_file():
            made = read_interventions(self.path)
            was = load_config(self.config)  # a crash may have come between an operation and this file
            changed = differences(replaced(was, made.changes) if made else was, config)
            refuse_other_model(changed, f"{self.path} belongs to a run of another model")
        with self.explained():
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._claim = Claim(self.path, end_at_once)
            try:
                self._claim.take()
            except ConfigError:
                self._let_go()  # and leave everything as it is: it is another run's
                raise
            try:
                write_partial(self.config, dump_config(config).encode())
            finally:
                partial(self.config).unlink(missing_ok=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the run from being started inside the block. ConfigError: it is no run's, or in use."""
        require_run(self.path)
        with self.explained(), ExitStack() as stack:
            claim = Claim(self.path, end_at_once)
            stack.callback(claim.release)
            claim.take()
            yield

    def commit(self, config: Config) -> None:
        """Write the format of the directory and the resolved configuration.

        Raises:
            ConfigError: They cannot be written.
        """
        stamp = {"version": VERSION, "written_by": package_version()}
        with self.explained():
            replace_file(self.path / FORMAT, f"{json.dumps(stamp)}\n".encode())
            replace_file(self.config, dump_config(config).encode())

    def release(self) -> None:
        """Undo :meth:`claim`; in a directory in which no run has begun, nothing is left behind."""
        if self._claim is None:
            return
        self._let_go()
        if not self.config.exists():
            for remove in ((self.path / LOCK).unlink, self.checkpoints.rmdir, self.path.rmdir):
                try:
                    remove()
                except OSError:
                    return  # something is in it that is not ours

    def _let_go(self) -> None:
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn an OSError inside the block into a ConfigError."""
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"run.directory {str(self.path)!r} cannot be written: {error.strerror or error}; "
                "choose another directory, or make room or permission there"
            ) from None


def require_run(run: str | Path) -> None:
    """Raise ConfigError unless this is a run's directory."""
    if not RunDirectory(run).config.is_file():
        raise ConfigError(f"{run} is no run's directory: it has no config.yaml; name the run.directory of a run")


def require_known_format(run: Path) -> None:
    """See that this version of the program can read a run's directory; one that does not say is of format 1.

    Raises:
        FormatError: A newer version wrote it.
        DataError: What it says is not readable.
    """
    path = run / FORMAT
    if patiently(path.exists, path):
        refuse_unknown_format(run, read_json(path), VERSION)


def differences(before: Config, now: Config) -> dict[str, list[Any]]:
    """Fields whose values differ, ``{"section.field": [before, now]}``."""
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    return {
        f"{section}.{field}": [old[section][field], value]
        for section, fields in new.items()
        if section not in SILENT
        for field, value in fields.items()
        if old[section][field] != value and (section, field) != ("run", "directory")
    }


def refuse_other_model(changed: dict[str, list[Any]], what: str) -> None:
    """Raise ConfigError if anything changed that makes it another model."""
    wrong = {
        key: values for key, values in changed.items() if key.startswith("model.") and key.split(".")[1] not in FREE
    }
    if wrong:
        lines = "\n".join(f"  {key}: {before} there, {now} here" for key, (before, now) in wrong.items())
        raise ConfigError(f"{what}:\n{lines}\nset these as they were, or choose another run.directory")
