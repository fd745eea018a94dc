"""Parameters of the named sizes, by formula, and of models that are really built."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_stable.config.schema import ModelConfig
from megatron_stable.config.sizes import SIZES
from megatron_stable.model.transformer import Transformer, layer_list, padded_vocabulary, parameter_count
from megatron_stable.parallel.parameters import place
from megatron_stable.parallel.topology import TensorParallel

BILLIONS = {"m": 1e-3, "b": 1.0}
# layers, hidden: no biases, four matrices of 12 h^2, two norms a block
SHAPES = {
    "tiny": (4, 256),
    "10m": (3, 512),
    "85m": (12, 768),
    "302m": (24, 1024),
    "830m": (24, 1024),
    "1b": (24, 2048),
    "3b": (28, 3072),
    "7b": (32, 4096),
    "10b": (48, 4096),
    "13b": (40, 5120),
    "30b": (48, 7168),
}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_the_parameters_of_the_formula(size: str) -> None:
    layers, h = SHAPES[size]
    vocab = 256000 if size == "830m" else 32000
    inner = layers * (12 * h * h + 2 * h) + h
    assert parameter_count(ModelConfig(size=size, vocab_size=vocab)) == (inner + 2 * vocab * h, inner)


@pytest.mark.parametrize("size", [size for size in SIZES if size != "tiny"])
def test_sizes_have_about_the_parameters_of_their_name(size: str) -> None:
    """Outside embedding and head; 830m, which is named after arXiv 2410.16682, with them."""
    total, inner = parameter_count(ModelConfig(size=size, vocab_size=256000 if size == "830m" else 32000))
    named = float(size[:-1]) * BILLIONS[size[-1]] * 1e9
    # "1b" is 24 x 2048, 1.21 billion
    assert (total if size == "830m" else inner) == pytest.approx(named, rel=0.21 if size == "1b" else 0.15)


def test_the_paper_s_model_has_830_million() -> None:
    config = ModelConfig(size="830m")
    assert (config.layers, config.hidden, config.heads, config.sequence_length) == (24, 1024, 16, 4096)
    assert config.vocab_size == 256000 and not config.tied_embeddings
    assert 820e6 < parameter_count(config)[0] < 840e6


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"recipe": "qk_norm", "bias": True},
        {"activation": "swiglu", "kv_heads": 2, "bias": True, "norm": "rmsnorm"},
        {"positions": "learned", "tied_embeddings": True, "activation": "squared_relu", "ffn_hidden": 72},
    ],
)
def test_count_agrees_with_a_model_that_is_built(fields: dict[str, Any]) -> None:
    shape = {"size": None, "layers": 3, "hidden": 32, "heads": 4, "sequence_length": 16, "vocab_size": 61}
    config = ModelConfig(**{**shape, **fields})
    model = Transformer(layer_list(config, TensorParallel(), seed=0))
    matrices = 1 if config.tied_embeddings else 2
    padding = matrices * (padded_vocabulary(61, 1) - 61) * 32
    total = sum(p.numel() for p in model.parameters()) - padding
    inner = sum(p.numel() for p in model.parameters() if place(p).name.startswith(("blocks.", "final_norm")))
    assert parameter_count(config) == (total, inner)
    assert parameter_count(config, 100)[0] == total + matrices * (100 - 61) * 32
