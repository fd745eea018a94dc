"""The model as one list of layers, and the same list run by a single stage.

``layer_list`` is all there is to know: with one pipeline stage :class:`Transformer` runs it in order, with more
the engine hands it to DeepSpeed's pipeline. There is no second forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn

from megatron_stable.config.parametrization import ModelMultipliers
from megatron_stable.config.schema import ModelConfig
from megatron_stable.model import sigma
from megatron_stable.model.backends import choose_backend
from megatron_stable.model.block import Block
from megatron_stable.model.elementwise import Scale, ScaleGradient
from megatron_stable.model.init import embedding_init, head_init
from megatron_stable.model.norms import residual_norm
from megatron_stable.model.positions import EmbeddingOutput
from megatron_stable.parallel.layers import VocabParallelEmbedding, column_linear
from megatron_stable.parallel.parameters import initialize, name_parameters, parameter
from megatron_stable.parallel.topology import TensorParallel

VOCAB_MULTIPLE = 128  # rows of the embedding are padded to a multiple of this, which matrix units like


@dataclass(frozen=True)
class Layer:
    """A layer of the list: its name and how to build it.

    Attributes:
        name: Prefix of the global names of its parameters.
        build: Makes the module, with parameters named and drawn.
        cost: Floating-point operations per token in forward, attention over the full s x s (PaLM, App. B);
            balances pipeline stages and gives MFU.
        tied: Name of the layer whose module this one shares.
    """

    name: str
    build: Callable[[], nn.Module]
    cost: float = 0.0
    tied: str | None = None


def padded_vocabulary(vocab_size: int, tp_size: int) -> int:
    """Rows of embedding and head: a multiple of 128 and of the TP size."""
    multiple = lcm(VOCAB_MULTIPLE, tp_size)
    return -(-vocab_size // multiple) * multiple


class Head(nn.Module):
    """The output head: ``[b, s, h]``, under SP ``[b, s/tp, h]`` -> logits ``[b, s, v/tp]``."""

    def __init__(self, weight: nn.Parameter, tp: TensorParallel) -> None:
        super().__init__()
        self.weight, self.tp = weight, tp

    def forward(self, x: Tensor) -> Tensor:
        return project(self, x)


def project(module: Any, x: Tensor) -> Tensor:
    """Logits from the final hidden state, with the weight of a :class:`Head` or of a tied embedding."""
    return column_linear(x, module.weight, module.tp)


def layer_list(
    config: ModelConfig,
    tp: TensorParallel,
    seed: int,
    device: str = "cpu",
    draw: bool = True,
    multipliers: ModelMultipliers | None = None,
    dtype: torch.dtype = torch.float32,
    documents: bool = False,
) -> list[Layer]:
    """The layers of the model, in order; ``config.vocab_size`` must be known.

    Args:
        seed: Of initialisation.
        device: "cpu" or "cuda": where it will run, which decides the attention backend. Each layer goes there as soon
            as it is built, so that the host holds one at a time.
        draw: Whether to draw the parameters; without it they are NaN, and to be filled from a checkpoint.
        multipliers: Of the parametrization; ``None``: the standard ones.
        dtype: Of the parameters; they are drawn in fp32.
        documents: Whether attention stays within documents; :class:`~megatron_stable.model.documents.DocumentMask`
            says where they begin.

    Raises:
        ConfigError: When a block is built: ``config.attention`` does not run on ``device``.
    """
    assert config.vocab_size is not None
    h, s, vocab_size = config.hidden, config.sequence_length, config.vocab_size
    rows = padded_vocabulary(vocab_size, tp.size)
    by = multipliers or ModelMultipliers(config.head_dim**-0.5)

    def layer(name: str, make: Callable[[], nn.Module], cost: float = 0.0, tied: str | None = None) -> Layer:
        def build() -> nn.Module:
            module = make()
            name_parameters(module, name)
            if draw:
                initialize(module, seed)
            for weight in module.parameters():
                weight.data = weight.data.to(dtype)
            if device != "cpu":
                module.to(device)
            if draw:
                sigma.start(module, seed)
            return module

        return Layer(name, build, cost, tied)

    def optional(present: bool, name: str, make: Callable[[], nn.Module]) -> list[Layer]:
        return [layer(name, make)] if present else []

    def block(index: int) -> nn.Module:
        backend = choose_backend(config, device, documents).name
        module = Block(config, tp, backend, recomputes(config, index), by)
        if config.compile is True:  # auto is for a run to decide, all ranks alike
            module.compile(dynamic=False)
        return module

    width, kv = config.heads * config.head_dim, 2 * config.groups * config.head_dim
    ffn = config.ffn * (3 if config.gated else 2)
    block_cost = 2.0 * h * (2 * width + kv + ffn) + 4.0 * s * width
    head = layer(
        "head",
        lambda: Head(parameter((rows, h), head_init(config, vocab_size, by), tp, 0), tp),
        cost=2.0 * h * rows,
        tied="embedding" if config.tied_embeddings else None,
    )
    return [
        layer("embedding", lambda: VocabParallelEmbedding(rows, h, embedding_init(config, vocab_size), tp)),
        *optional(
            config.embedding_gradient != 1.0, "embedding_gradient", lambda: ScaleGradient(config.embedding_gradient)
        ),
        *optional(config.embedding_scale, "embedding_scale", lambda: Scale(h**0.5)),
        *optional(config.embedding_norm, "embedding_norm", lambda: residual_norm(config, tp)),
        layer("positions", lambda: EmbeddingOutput(config, tp)),
        *(layer(f"blocks.{i}", lambda i=i: block(i), block_cost) for i in range(config.layers)),  # type: ignore[misc]
        # the last norm of a post-norm block is the final one
        *optional(not config.deepnorm, "final_norm", lambda: residual_norm(config, tp)),
        *optional(by.logits != 1.0, "logits_scale", lambda: Scale(by.logits)),
        head,
    ]


def recomputes(config: ModelConfig, index: int) -> bool:
    """Whether block ``index`` recomputes its activations in backward."""
    if isinstance(config.activation_checkpointing, int):
        return index % config.activation_checkpointing == 0
    return config.activation_checkpointing == "full"


class Transformer(nn.Module):
    """A decoder-only Transformer on one pipeline stage: ``[b, s]`` token ids -> ``[b, s, v/tp]`` logits."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for layer in layers:
            if layer.tied is None:
                module = layer.build()
            else:
                shared = self.layers[layer.tied]
                assert isinstance(shared, VocabParallelEmbedding)
                module = Head(shared.weight, shared.tp)
            self.layers[layer.name.replace(".", "_")] = module

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens
        for module in self.layers.values():
            x = module(x)
        return x


def parameter_count(config: ModelConfig, vocab_size: int | None = None) -> tuple[int, int]:
    """(all parameters, those outside embedding and head), counted on the model itself without allocating it."""
    config = config.model_copy(update={"vocab_size": vocab_size or config.vocab_size, "attention": "math"})
    assert config.vocab_size is not None
    counts: dict[str, int] = {}
    with torch.device("meta"):
        for layer in layer_list(config, TensorParallel(), seed=0, draw=False):
            if layer.name.startswith("blocks.") and layer.name != "blocks.0":
                counts[layer.name] = counts["blocks.0"]
            elif layer.name not in ("embedding", "head"):  # whose rows are padded
                counts[layer.name] = sum(weight.numel() for weight in layer.build().parameters())
    inner = sum(count for name, count in counts.items() if name.startswith(("blocks.", "final_norm")))
    matrices = config.vocab_size * config.hidden * (1 if config.tied_embeddings else 2)
    return sum(counts.values()) + matrices, inner
