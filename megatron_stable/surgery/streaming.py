"""A stored model as layers that are in memory one at a time, and batches that go through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_stable.checkpoint.format import Manifest
from megatron_stable.checkpoint.model import head_of
from megatron_stable.checkpoint.reader import Reader
from megatron_stable.config.parametrization import model_multipliers
from megatron_stable.config.schema import Config, ModelConfig
from megatron_stable.model import sigma
from megatron_stable.model.documents import DocumentMask
from megatron_stable.model.transformer import Layer, layer_list
from megatron_stable.parallel.parameters import place
from megatron_stable.parallel.shards import Place, Shard
from megatron_stable.parallel.topology import TensorParallel


def layers(config: Config) -> list[Layer]:
    """The model's, whole and on the host, with the attention backend that runs there."""
    model, by = _on_host(config.model), model_multipliers(config)
    found = layer_list(
        model, TensorParallel(), config.run.seed, draw=False, multipliers=by, documents=config.data.document_mask
    )
    by_name = {layer.name: layer for layer in found}

    def alone(layer: Layer) -> Layer:
        if layer.tied is None:
            return layer
        return replace(layer, tied=None, build=head_of(by_name[layer.tied].build, TensorParallel()))

    return [alone(layer) for layer in found]


def _on_host(model: ModelConfig) -> ModelConfig:
    return model.model_copy(update={"attention": "auto", "compile": False, "activation_checkpointing": "none"})


def places(config: Config) -> dict[str, Place]:
    """All parameters and vectors of a model, as one rank would hold them, by name; nothing is allocated."""
    found: dict[str, Place] = {}
    with torch.device("meta"):
        for layer in layers(config):
            module = layer.build()
            for known in [*map(place, module.parameters()), *(known for known, _ in sigma.vectors(module))]:
                found[known.name] = known
    return found


@torch.no_grad()
def stream(directory: Path, manifest: Manifest, config: Config) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of a checkpoint's model, in order, in fp32 and evaluation mode; each is let go for the next."""
    reader = Reader(directory, manifest)

    def read(known: Place) -> Tensor:
        return reader.part("weight", Shard(known, 0, known.numel)).view(known.shape)

    for layer in layers(config):
        module = layer.build()
        for weight in module.parameters():
            weight.copy_(read(place(weight)))
        for known, vector in sigma.vectors(module):
            vector.copy_(read(known))
        sigma.measure(module)
        yield layer.name, module.eval()
        for weight in module.parameters():  # whoever has it still is done with it
            weight.data = weight.data.new_empty(0)
    reader.close()


@torch.no_grad()
def forward(
    module: nn.Module,
    batches: list[Tensor],
    ids: list[Tensor],
    config: Config,
    tick: Callable[[], None],
) -> list[Tensor]:
    """A layer's outputs for each of its inputs, which are let go.

    Args:
        ids: Of the tokens that the inputs come from, ``[b, s]`` each: what tells documents apart, if the run does.
        config: The model's.
        tick: Called after each.
    """
    outputs, mask = [], None
    if config.data.document_mask:
        assert config.data.end_of_document is not None
        mask = DocumentMask(module, _on_host(config.model), config.data.end_of_document, torch.device("cpu"))
    for tokens in ids:
        if mask is not None:
            mask.announce(tokens)
        outputs.append(module(batches.pop(0)))
        tick()
    return outputs
