"""A trained model, or a rank's part of it, from a checkpoint that any layout wrote: to be used, not to be trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_stable.checkpoint.catalog import Whole, newest_whole
from megatron_stable.checkpoint.format import stored_config
from megatron_stable.checkpoint.reader import Reader
from megatron_stable.config.parametrization import model_multipliers
from megatron_stable.config.schema import Config
from megatron_stable.errors import DataError
from megatron_stable.model import sigma
from megatron_stable.model.transformer import Head, Layer, Transformer, layer_list, parameter_count
from megatron_stable.parallel.layers import VocabParallelEmbedding
from megatron_stable.parallel.parameters import place
from megatron_stable.parallel.shards import Place, Shard
from megatron_stable.parallel.stages import stage_bounds
from megatron_stable.parallel.topology import TensorParallel, Topology


def load_model(run: str | Path, step: int | None = None, device: str = "cpu") -> tuple[Config, Transformer, int]:
    """The model of a run in fp32, in evaluation mode, in this process.

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
    config = usable_config(whole)
    model = fill(whole, config, device)
    sigma.measure(model)
    return config, model, whole.step


def usable_config(whole: Whole) -> Config:
    """The configuration of a checkpoint's run, with the attention backend that runs here."""
    config = stored_config(whole.directory, whole.manifest)
    # the backend of the training run may need a GPU, or half precision; and lengths vary, which compiled blocks dislike
    model = config.model.model_copy(update={"attention": "auto", "compile": False})
    return config.model_copy(update={"model": model})


@torch.no_grad()
def fill(whole: Whole, config: Config, device: str, topology: Topology | None = None) -> Transformer:
    """The model in fp32, in evaluation mode: all of it, or a rank's stage and slices. Only those are read.

    To be followed by ``sigma.measure``, which is collective: when no rank has raised.

    Raises:
        DataError: The checkpoint is damaged, or does not hold the model.
    """
    reader = Reader(whole.directory, whole.manifest)
    _refuse_larger(config, reader)
    tp = topology.tp if topology else TensorParallel()
    by, documents = model_multipliers(config), config.data.document_mask
    layers = layer_list(config.model, tp, config.run.seed, device, False, by, documents=documents)
    model = Transformer(_stage(layers, topology) if topology else layers)

    def read(known: Place) -> Tensor:
        return reader.part("weight", Shard(known, 0, known.numel)).view(known.shape)

    for weight in model.parameters():
        weight.copy_(read(place(weight)))
    for known, vector in sigma.vectors(model):
        vector.copy_(read(known))
    reader.close()
    return model.to(device).eval()


def _stage(layers: list[Layer], topology: Topology) -> list[Layer]:
    """The layers of this rank's stage; a head that is tied to another stage's embedding has one of its own."""
    blocks = [layer.name.startswith("blocks.") for layer in layers]
    bounds = stage_bounds([layer.cost for layer in layers], blocks, topology.pipeline_size)
    own = layers[bounds[topology.stage] : bounds[topology.stage + 1]]
    here = {layer.name for layer in own}
    by_name = {layer.name: layer for layer in layers}

    def alone(layer: Layer) -> Layer:
        if layer.tied is None or layer.tied in here:
            return layer
        return replace(layer, tied=None, build=head_of(by_name[layer.tied].build, topology.tp))

    return [alone(layer) for layer in own]


def head_of(build: Callable[[], nn.Module], tp: TensorParallel) -> Callable[[], nn.Module]:
    """Builds a head that has a tied embedding's weight, by itself."""

    def head() -> nn.Module:
        embedding = build()
        assert isinstance(embedding, VocabParallelEmbedding)
        return Head(embedding.weight, tp)

    return head


def _refuse_larger(config: Config, reader: Reader) -> None:
    """Do not make room for a model that the checkpoint cannot fill."""
    names = reader.names()
    if (
        config.model.vocab_size is None
        or config.model.layers > len(names)
        or parameter_count(config.model)[0] > sum(prod(reader.shape(name)) for name in names)
    ):
        raise DataError(f"{reader.directory}: its configuration is that of a model that it does not hold")
