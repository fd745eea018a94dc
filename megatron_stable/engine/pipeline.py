"""The model's list of layers as DeepSpeed's pipeline: which stage holds which layers, and tied embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron_stable.config.schema import Config
from megatron_stable.model.transformer import Layer, project
from megatron_stable.optim.groups import settings
from megatron_stable.parallel.parameters import place
from megatron_stable.parallel.stages import stage_bounds
from megatron_stable.parallel.topology import Topology


class _Spec(LayerSpec):
    """A layer that is built on the stage that holds it, and nowhere else."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(nn.Module)
        self.layer = layer

    def build(self, log: bool = False) -> nn.Module:
        return self.layer.build()


class _TiedSpec(TiedLayerSpec):
    """A layer whose weight is shared between stages; DeepSpeed sums its gradients over them."""

    def __init__(self, layer: Layer, forward: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__(layer.name, nn.Module, forward_fn=forward, tied_weight_attr=["weight"])
        self.layer = layer

    def build(self, log: bool = False) -> nn.Module:
        return self.layer.build()


class TransformerPipeline(PipelineModule):
    """The layers of this rank's stage.

    Args:
        loss: ``(logits [b, s, v/tp], targets [b, s]) -> scalar``, called on the last stage.
    """

    def __init__(self, layers: list[Layer], topology: Topology, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        by_name = {layer.name: layer for layer in layers}
        shared = {layer.tied for layer in layers if layer.tied}
        specs = [
            _TiedSpec(by_name[layer.tied], forward=project)
            if layer.tied
            else (_TiedSpec if layer.name in shared else _Spec)(layer)
            for layer in layers
        ]
        is_block = [layer.name.startswith("blocks.") for layer in layers]
        self.bounds = stage_bounds([layer.cost for layer in layers], is_block, topology.pipeline_size)
        grid = PipeModelDataParallelTopology(topology.pipeline_size, topology.tensor_size, topology.data_size)
        super().__init__(specs, topology=grid, loss_fn=loss)

    def _partition_layers(self, method: str = "parameters") -> None:
        self.parts = self.bounds
        self._set_bounds(start=self.bounds[self.stage_id], stop=self.bounds[self.stage_id + 1])

    def get_tied_weights_and_groups(self) -> list[tuple[Any, Any]]:
        """What DeepSpeed reduces over the stages that share a weight: its accumulated gradient, wherever that is.

        ZeRO-1 under fp16 accumulates in ``grad_accum``, which DeepSpeed's own reduction of tied gradients overlooks.
        """
        found = []
        for weight, group in super().get_tied_weights_and_groups():
            accumulated = getattr(weight, "grad_accum", None)
            grad = weight.grad if accumulated is None else accumulated
            found.append((SimpleNamespace(grad=grad, _hp_grad=getattr(weight, "_hp_grad", None)), group))
        return found


@contextmanager
def even_groups(model: nn.Module, config: Config, topology: Topology) -> Iterator[None]:
    """Within, every stage has parameters in the same groups of the optimizer. Collective.

    DeepSpeed's ZeRO-1 sums the gradient norm over the stages once per group, so that stages with different groups would
    wait for each other for ever. A stage that lacks a group gets a filler: one element, 0, which has no gradient. It is
    the model's only while DeepSpeed takes the model over.
    """
    own = {f"{settings(known, config)}": known for known in map(place, model.parameters())}
    stages = [own] * topology.pipeline_size
    dist.all_gather_object(stages, own, group=topology.pipeline_group)
    lacking = {group: known for stage in stages for group, known in stage.items() if group not in own}
    for i, known in enumerate(lacking.values()):
        filler = nn.Parameter(torch.zeros(1))
        filler.place = known  # type: ignore[attr-defined]
        model.register_parameter(f"filler_{i}", filler)
    yield
    for i in range(len(lacking)):
        delattr(model, f"filler_{i}")
