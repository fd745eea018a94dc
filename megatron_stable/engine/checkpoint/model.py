"""A trained model in one process, from a checkpoint that any layout wrote: for generation, evaluation and export."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_stable.config.load import parse_config
from megatron_stable.config.schema import Config
from megatron_stable.engine.checkpoint import store
from megatron_stable.engine.checkpoint.reader import Reader
from megatron_stable.errors import DataError
from megatron_stable.model.transformer import Transformer, layer_list
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
        (configuration it was trained with, model, step of the checkpoint)

    Raises:
        DataError: There is no such checkpoint, or it is damaged.
    """
    root = Path(run) / "checkpoints"
    found = [entry for entry in store.entries(root) if step is None or entry.step == step]
    whole = next((entry for entry in reversed(found) if entry.manifest and store.damage(entry) is None), None)
    if whole is None or whole.manifest is None:
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        problem = f": {store.damage(found[-1])}" if found else "; `megatron-stable pretrain` writes them"
        raise DataError(f"{root} holds {wanted} that can be used{problem}")
    config = parse_config(whole.manifest.config)
    model = Transformer(layer_list(config.model, TensorParallel(), config.run.seed, device, draw=False))
    reader = Reader(whole.directory, whole.manifest)
    for weight in model.parameters():
        weight.copy_(reader.full(place(weight).name, "weight", place(weight).full_shape))
    return config, model.to(device).eval(), whole.step
