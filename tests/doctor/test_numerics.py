"""A step on all ranks is compared with one process: good ranks pass in every recipe, a wrong one is named."""

from __future__ import annotations

import os
from typing import Any

import pytest

from megatron_stable.config.checks import conflicts
from megatron_stable.config.recipes import RECIPES
from megatron_stable.config.schema import Config
from megatron_stable.doctor.finding import Finding, Verdict
from megatron_stable.doctor.numerics import BOUNDS, VOCAB, cases, shrunken
from megatron_stable.engine.faults import VARIABLE
from tests.doctor.rounds import compare_on_ranks, compare_with_a_wrong_layer
from tests.harness.ranks import Ranks

GRID = {"tensor": 2, "pipeline": 2, "sequence": True}
QUICK = ("qk_norm_cap", "sigma_reparam", "deepnorm")


def run(recipe: str = "qk_norm", dtype: str = "fp32", parallel: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "model": {"recipe": recipe},
        "precision": {"dtype": dtype},
        "parallel": parallel or {},
        "loss": {"z_loss": 1e-3},
    }


def failed(found: list[list[Finding]]) -> list[str]:
    """What rank 0 found wrong."""
    return [finding.text for finding in found[0] if finding.verdict is not Verdict.OK]


def full(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.full)


@pytest.mark.parametrize(
    ("dtype", "parallel"),
    [
        ("fp32", GRID),
        ("bf16", GRID),
        ("fp16", {"zero_stage": 2}),
        full("fp16", GRID),
        full("fp32", {"zero_stage": 2}),
        full("bf16", {"zero_stage": 2}),
    ],
)
@pytest.mark.parametrize("recipes", [QUICK, full(tuple(RECIPES))], ids=["some", "all"])
def test_good_ranks_pass(ranks: Ranks, recipes: tuple[str, ...], dtype: str, parallel: dict[str, Any]) -> None:
    given = [run(recipe, dtype, parallel) for recipe in recipes]
    found = ranks.run(4, compare_on_ranks, given, timeout=280)
    assert failed(found) == []
    # the bounds are above rounding, and not far above
    assert max(finding.numbers["weight"] for finding in found[0]) > BOUNDS[dtype] / 100


@pytest.mark.parametrize(
    ("dtype", "parallel"),
    [
        ("fp32", {"tensor": 2}),
        ("bf16", {"zero_stage": 3}),
        *(full("bf16", parallel) for parallel in ({"tensor": 2}, {"pipeline": 2}, {})),
        *(full("fp32", parallel) for parallel in ({"zero_stage": 3}, {"pipeline": 2}, {})),
    ],
)
def test_a_layer_that_is_wrong_on_one_rank(ranks: Ranks, parallel: dict[str, Any], dtype: str) -> None:
    """Rank 1's attention gives its input half of its gradient, as if a sum over two were lost."""
    found = ranks.run(2, compare_with_a_wrong_layer, run(dtype=dtype, parallel=parallel), 1, 0.5)
    (text,) = failed(found)
    assert "the gradient of blocks." in text


def with_fault(values: dict[str, Any], fault: str) -> list[Finding]:
    os.environ[VARIABLE] = fault
    return compare_on_ranks([values])


def test_a_gradient_that_is_not_finite(ranks: Ranks) -> None:
    found = ranks.run(2, with_fault, run(), '[{"kind": "nan_gradient", "data_steps": [1, 1], "rank": 1}]')
    (text,) = failed(found)
    assert "the gradient norm is off by inf" in text


def test_a_small_error_is_found_in_fp32(ranks: Ranks) -> None:
    (text,) = failed(ranks.run(2, compare_with_a_wrong_layer, run(), 0, 1.01))
    assert "is off by" in text


def test_the_run_is_shrunken_in_its_own_layout_and_precision() -> None:
    config = Config.model_validate(
        {
            "model": {"size": "10b", "recipe": "qk_norm_cap", "activation": "swiglu", "norm": "rmsnorm", "kv_heads": 8,
                      "dropout": 0.1, "activation_checkpointing": "full"},
            "parallel": {"tensor": 4, "pipeline": 2, "sequence": True},
            "precision": {"dtype": "bf16", "reduce_dtype": "bf16"},
            "batch": {"global_size": 512, "micro_size": 1},
        }
    )  # fmt: skip
    (small,) = cases(config, 64)
    assert conflicts(small, 64) == []
    assert (small.parallel, small.precision.dtype, small.precision.reduce_dtype) == (config.parallel, "bf16", "bf16")
    assert small.model.recipe == "qk_norm_cap" and small.model.attention_cap == config.model.attention_cap
    assert (small.model.kv_heads, small.model.heads, small.model.layers) == (4, 16, 4)
    assert small.model.vocab_size == VOCAB and small.model.dropout == 0


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 24])
def test_without_a_run_layouts_fit_the_ranks(size: int) -> None:
    found = cases(None, size)
    assert all(conflicts(config, size) == [] for config in found)
    assert {config.precision.dtype for config in found} == {"fp32", "bf16"}
    assert max(config.parallel.tensor for config in found) == (2 if size % 2 == 0 else 1)
    assert max(config.parallel.pipeline for config in found) == (2 if size % 4 == 0 or size == 2 else 1)
    assert max(config.parallel.zero_stage for config in found) == (3 if size > 1 else 1)


def test_a_layout_that_does_not_fit_is_tried_alone_in_its_precision() -> None:
    config = Config.model_validate({**run("olmo2", "bf16", {"tensor": 2, "pipeline": 4}), "model": {"layers": 8}})
    (small,) = cases(config, 1)
    assert (small.parallel.tensor, small.parallel.pipeline, small.precision.dtype) == (1, 1, "bf16")
    assert conflicts(small, 1) == []


def test_kinds_of_attention_heads_are_kept() -> None:
    for kv_heads, tensor, expected in ((None, 1, (2, None)), (4, 2, (8, 2)), (1, 1, (4, 1)), (16, 8, (8, None))):
        values = {"model": {"heads": 16, "kv_heads": kv_heads}, "parallel": {"tensor": tensor}}
        small = shrunken(Config.model_validate(values), tensor)
        assert (small.model.heads, small.model.kv_heads) == expected
        assert conflicts(small, tensor) == []
