"""A run's directory: where things are in it, and whether it belongs to the run that wants it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_stable.config.load import dump_config, load_config
from megatron_stable.config.schema import Config
from megatron_stable.errors import ConfigError
from megatron_stable.stability.ledger import Ledger

# fields of `model` that may change from one start of a run to the next: names and what does not change the function
FREE = {"size", "recipe", "attention", "activation_checkpointing", "compile", "dropout", "attention_dropout"}
# what only says where and how often to write
SILENT = {"logging", "checkpoint"}


class RunDirectory:
    """The directory that names a run. Only rank 0 writes to it, but for the checkpoints."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.ledger = Ledger(self.path / "ledger.jsonl")

    def claim(self, config: Config) -> dict[str, list[Any]]:
        """Make the directory this run's: create it, or check that it is, and write the resolved configuration.

        Returns:
            What differs from the last start, ``{"section.field": [before, now]}``.

        Raises:
            ConfigError: It cannot be written to, or belongs to a run of another model.
        """
        before = load_config(self.config) if self.config.is_file() else None
        changed = differences(before, config) if before else {}
        refuse_other_model(changed, f"{self.path} belongs to a run of another model")
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            beside = self.path / ".config.yaml.new"
            try:
                beside.write_text(dump_config(config), encoding="utf-8")
                with beside.open("rb") as file:
                    os.fsync(file.fileno())
                beside.rename(self.config)
            finally:
                beside.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(
                f"run.directory {str(self.path)!r} cannot be written: {error.strerror or error}; "
                "choose another directory, or make room or permission there"
            ) from None
        return changed


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
