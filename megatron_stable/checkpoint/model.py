"""A trained model in one process, from a checkpoint that any layout wrote: for generation, evaluation and export."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch

from megatron_stable.checkpoint.catalog import newest_whole
from megatron_stable.checkpoint.format import stored_config
from megatron_stable.checkpoint.reader import Reader
from megatron_stable.config.parametrization import model_multipliers
from megatron_stable.config.schema import Config
from megatron_stable.errors import DataError
from megatron_stable.model import sigma
from megatron_stable.model.transformer import Transformer, layer_list, parameter_count
from megatron_stable.parallel.parameters import place
from megatron_stable.parallel.topology import TensorParallel


@torch.no_grad()
def load_model(run: str | Path, step: int | None = None, device: str = "cpu") -> tuple[Config, Transformer, int]:
    """The model of a run in fp32, in evaluation mode.

    Args:
        run: The run's directory.
        step: Of the checkpoint; ``None``: the newest that is whole.
        device: Where to put it.

    Returns:
        (configuration it was trained with, though with the attention backend that runs here, model, step of the
        checkpoint)

    Raises:
        DataError: There is no such checkpoint, or it is damaged.
    """
    whole = newest_whole(run, step)
    config = stored_config(whole.directory, whole.manifest)
    # the backend of the training run may need a GPU, or half precision; and lengths vary, which compiled blocks dislike
    model_config = config.model.model_copy(update={"attention": "auto", "compile": False})
    config = config.model_copy(update={"model": model_config})
    reader = Reader(whole.directory, whole.manifest)
    _refuse_larger(config, reader)
    layers = layer_list(
        config.model, TensorParallel(), config.run.seed, device, draw=False, multipliers=model_multipliers(config)
    )
    model = Transformer(layers)
    for weight in model.parameters():
        weight.copy_(reader.full(place(weight).name, "weight", place(weight).full_shape))
    for known, vector in sigma.vectors(model):
        vector.copy_(reader.full(known.name, "weight", known.full_shape))
    sigma.measure(model)
    return config, model.to(device).eval(), whole.step


def _refuse_larger(config: Config, reader: Reader) -> None:
    """Do not make room for a model that the checkpoint cannot fill."""
    names = reader.names()
    if (
        config.model.vocab_size is None
        or config.model.layers > len(names)
        or parameter_count(config.model)[0] > sum(prod(reader.shape(name)) for name in names)
    ):
        raise DataError(f"{reader.directory}: its configuration is that of a model that it does not hold")
