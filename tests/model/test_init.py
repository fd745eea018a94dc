"""How weights are drawn: the rules' statistics, and that a seed names the same function on every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_stable.config.schema import ModelConfig
from megatron_stable.model.transformer import Transformer, layer_list, padded_vocabulary
from megatron_stable.parallel.parameters import parameter, place
from megatron_stable.parallel.shards import ZEROS
from megatron_stable.parallel.topology import TensorParallel

VOCAB = 300


def config(**fields: Any) -> ModelConfig:
    shape = {"size": None, "layers": 3, "hidden": 128, "heads": 4, "sequence_length": 16, "vocab_size": VOCAB}
    return ModelConfig(**{**shape, **fields})


def weights(cfg: ModelConfig, tp: TensorParallel | None = None, seed: int = 1) -> dict[str, Tensor]:
    model = Transformer(layer_list(cfg, tp or TensorParallel(), seed))
    return {place(p).name: p.detach() for p in model.parameters()}


def deviation(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def close(x: Tensor, std: float) -> bool:
    """Whether the deviation is ``std``, within five of its own standard errors."""
    return abs(deviation(x) / std - 1) < 5 / (2 * x.numel()) ** 0.5


MATRICES = {"attention.qkv": 128, "attention.proj": 128, "mlp.fc1": 128, "mlp.fc2": 512}  # fan-in


def test_fan_in_is_truncated_at_two_deviations_of_the_parent_and_keeps_its_own() -> None:
    drawn = weights(config())
    heads = {"head.weight": 128}
    linear = {f"blocks.{i}.{name}.weight": fan for i in range(3) for name, fan in MATRICES.items()}
    for name, fan_in in {**linear, **heads}.items():
        value = drawn[name][:VOCAB] if name == "head.weight" else drawn[name]
        std = fan_in**-0.5
        assert close(value, std), name
        assert abs(float(value.mean())) < 5 * std / value.numel() ** 0.5, name
        # of a standard normal cut at +-2: 0.8796
        assert 0.99 * 2 / 0.8796256 < float(value.abs().max()) / std <= 2 / 0.8796256 + 1e-4, name
    embedding = drawn["embedding.weight"][:VOCAB]
    assert close(embedding, 128**-0.5)
    assert float(embedding.abs().max()) * 128**0.5 > 3, "the embedding is not truncated"


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("rule", ["fan_in", "fixed"])
def test_output_projections_are_scaled_where_asked(rule: str, scaled: bool) -> None:
    drawn = weights(config(init=rule, init_std=0.05, init_scaled_output=scaled, positions="learned"))
    for name, fan_in in MATRICES.items():
        std = 0.05 if rule == "fixed" else fan_in**-0.5
        if scaled and name in ("attention.proj", "mlp.fc2"):
            std /= 6**0.5
        assert all(close(drawn[f"blocks.{i}.{name}.weight"], std) for i in range(3)), name
    for name in ("embedding.weight", "positions.weight", "head.weight"):
        assert close(drawn[name][:VOCAB], 0.05 if rule == "fixed" else 128**-0.5), name
    if rule == "fixed":
        assert float(drawn["blocks.0.mlp.fc1.weight"].abs().max()) > 3 * 0.05, "fixed is not truncated"


def test_norms_start_as_identity_and_biases_at_zero() -> None:
    drawn = weights(config(bias=True, recipe="qk_norm"))
    for name, value in drawn.items():
        if name.endswith(".bias"):
            assert (value == 0).all(), name
        elif "norm" in name:
            assert (value == 1).all(), name


MODELS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "swiglu_gqa": {"activation": "swiglu", "kv_heads": 4, "heads": 8, "bias": True, "recipe": "qk_norm"},
    "fixed_learned": {"init": "fixed", "positions": "learned", "tied_embeddings": True},
}


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("tensor", [2, 4])
def test_slices_of_all_ranks_make_the_full_draw(tensor: int, fields: dict[str, Any]) -> None:
    full, parts = weights(config(**fields)), joined(config(**fields), tensor)
    assert set(parts) == set(full)
    assert all(torch.equal(parts[name], whole) for name, whole in full.items())


def joined(cfg: ModelConfig, tensor: int) -> dict[str, Tensor]:
    """What all TP ranks draw, put together; replicated parameters must be alike."""
    ranks = [Transformer(layer_list(cfg, TensorParallel(None, rank, tensor), 1)) for rank in range(tensor)]
    found = {}
    for parts in zip(*(model.parameters() for model in ranks), strict=True):
        known = place(parts[0])
        assert all(part.shape == known.shape for part in parts)
        assert known.dim is not None or all(torch.equal(part, parts[0]) for part in parts), known.name
        found[known.name] = (parts[0] if known.dim is None else torch.cat(parts, known.dim)).detach()
    return found


def test_which_dimension_is_sharded() -> None:
    cfg = config(activation="swiglu", kv_heads=4, heads=8, bias=True, ffn_hidden=64)
    model = Transformer(layer_list(cfg, TensorParallel(None, 1, 4), 1))
    shapes = {place(p).name: tuple(p.shape) for p in model.parameters()}
    assert {
        name.removeprefix("blocks.2."): shape for name, shape in shapes.items() if name.startswith("blocks.2.")
    } == {
        "attention_input_norm.weight": (128,),
        "attention_input_norm.bias": (128,),
        "attention.qkv.weight": (64, 128),  # one group: two queries, key and value of width 16
        "attention.qkv.bias": (64,),
        "attention.proj.weight": (128, 32),
        "attention.proj.bias": (128,),
        "mlp_input_norm.weight": (128,),
        "mlp_input_norm.bias": (128,),
        "mlp.fc1.weight": (2, 16, 128),
        "mlp.fc1.bias": (2, 16),
        "mlp.fc2.weight": (128, 16),
        "mlp.fc2.bias": (128,),
    }
    assert shapes["embedding.weight"] == shapes["head.weight"] == (96, 128)
    for p in model.parameters():  # what DeepSpeed's gradient norm counts on every TP rank
        assert p.model_parallel == p.tensor_model_parallel == (place(p).dim is not None)  # type: ignore[attr-defined]


def test_a_weight_depends_on_its_name_and_seed_alone() -> None:
    shallow, deep = weights(config(layers=2)), weights(config(layers=4, kv_heads=2, recipe="qk_norm"))
    for name, value in shallow.items():
        if "qkv" not in name:
            assert torch.equal(value, deep[name]), name
    other = weights(config(layers=2), seed=2)
    drawn = {name: value for name, value in shallow.items() if value.ndim > 1}
    assert len(drawn) == 10
    assert not any(torch.equal(value, other[name]) for name, value in drawn.items())


def test_no_two_weights_share_a_stream() -> None:
    """Equal streams would give equal (or proportional) leading elements."""
    drawn = [value.flatten()[:512].double() for value in weights(config()).values() if value.ndim > 1]
    stacked = torch.stack([value / value.norm() for value in drawn])
    off_diagonal = stacked @ stacked.T - torch.eye(len(drawn))
    assert off_diagonal.abs().max() < 6 / 512**0.5


@pytest.mark.parametrize("rule", ["fan_in", "fixed"])
@pytest.mark.parametrize("tensor", [3, 6, 12])
def test_padding_is_zero_and_shifts_nothing(tensor: int, rule: str) -> None:
    """100 rows of vocabulary are padded to 128 by one rank, and to 384 by any of these: real elements are the same."""
    cfg = config(hidden=96, heads=12, init=rule, vocab_size=100)
    alone, parts = weights(cfg), joined(cfg, tensor)
    for name, whole in alone.items():
        if name in ("embedding.weight", "head.weight"):
            assert (len(whole), len(parts[name])) == (128, 384)
            assert (whole[100:] == 0).all() and (parts[name][100:] == 0).all()
            assert (whole[:100].abs().sum(1) > 0).all()
            whole, parts[name] = whole[:100], parts[name][:100]
        assert torch.equal(parts[name], whole), name


@pytest.mark.parametrize(
    ("vocab", "tensor", "rows"), [(1, 1, 128), (128, 1, 128), (129, 2, 256), (256000, 8, 256000), (50257, 3, 50304)]
)
def test_padded_vocabulary(vocab: int, tensor: int, rows: int) -> None:
    assert padded_vocabulary(vocab, tensor) == rows


def test_a_size_that_tp_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="not divisible by 4"):
        parameter((6, 8), ZEROS, TensorParallel(None, 0, 4), 0)
