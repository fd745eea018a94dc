"""megatron-stable: pretraining of large language models that does not fall over, on the DeepSpeed engine.

What a library user needs is importable from here; nothing heavy is imported before it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_stable.config.load import load_config
    from megatron_stable.config.schema import Config
    from megatron_stable.data.indexed import IndexedDataset
    from megatron_stable.data.skip import SkipWindows
    from megatron_stable.data.tokenizer import Tokenizer
    from megatron_stable.model.loss import vocab_parallel_cross_entropy
    from megatron_stable.model.transformer import Transformer, layer_list
    from megatron_stable.parallel.topology import TensorParallel, Topology
    from megatron_stable.stability.detector import SpikeDetector, find_spikes
    from megatron_stable.stability.guard import Guard
    from megatron_stable.training.pretrain import train

__all__ = [
    "Config",
    "Guard",
    "IndexedDataset",
    "SkipWindows",
    "SpikeDetector",
    "TensorParallel",
    "Tokenizer",
    "Topology",
    "Transformer",
    "find_spikes",
    "layer_list",
    "load_config",
    "train",
    "vocab_parallel_cross_entropy",
]

_HOMES = {
    "Config": "config.schema",
    "Guard": "stability.guard",
    "IndexedDataset": "data.indexed",
    "SkipWindows": "data.skip",
    "SpikeDetector": "stability.detector",
    "TensorParallel": "parallel.topology",
    "Tokenizer": "data.tokenizer",
    "Topology": "parallel.topology",
    "Transformer": "model.transformer",
    "find_spikes": "stability.detector",
    "layer_list": "model.transformer",
    "load_config": "config.load",
    "train": "training.pretrain",
    "vocab_parallel_cross_entropy": "model.loss",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"megatron_stable.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
