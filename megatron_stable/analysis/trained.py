"""A trained run, opened in one process to be used: model, configuration and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from megatron_stable.checkpoint.model import load_model
from megatron_stable.config.schema import Config
from megatron_stable.data import Tokenizer
from megatron_stable.errors import DataError
from megatron_stable.model.transformer import Transformer


class Trained(NamedTuple):
    """A model, how it was trained, and what its token ids mean."""

    config: Config
    model: Transformer
    tokenizer: Tokenizer | None
    step: int

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


def open_run(run: str | Path, step: int | None = None, tokenizer: str | Path | None = None) -> Trained:
    """The model of a run in fp32 and evaluation mode, on the GPU if there is one.

    Args:
        run: The run's directory.
        step: Of the checkpoint; ``None``: the newest that is whole.
        tokenizer: The SentencePiece model; ``None``: the one that the run's configuration names, if it names one.

    Raises:
        DataError: There is no such run or checkpoint, or the tokenizer cannot be read.
    """
    if not (Path(run) / "checkpoints").is_dir():
        raise DataError(f"no run in {run}: name the run.directory of a run, the one that holds checkpoints/")
    config, model, step = load_model(run, step, "cuda" if torch.cuda.is_available() else "cpu")
    return Trained(config, model, _open_tokenizer(tokenizer, config, run), step)


def _open_tokenizer(given: str | Path | None, config: Config, run: str | Path) -> Tokenizer | None:
    if given is not None:
        return Tokenizer(given)
    if config.data.tokenizer is None:
        return None
    try:
        return Tokenizer(config.data.tokenizer)
    except DataError as error:
        raise DataError(
            f"{error}. {run} names it in data.tokenizer: "
            "start where the run was started, or name the file with --tokenizer"
        ) from None
