"""`run.deterministic`: kernels that cannot add in a fixed order are refused, and a step needs none of them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tests.engine.layouts import make_config, train_on_ranks
from tests.harness.ranks import Ranks


def deterministic_steps(values: dict[str, Any]) -> list[dict[str, Any]]:
    """On a rank: the metrics of some steps, all in a mode in which a kernel without order raises."""
    from megatron_stable.parallel.determinism import make_deterministic

    make_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] and os.environ["NCCL_ALGO"] == "Ring"
    with pytest.raises(RuntimeError, match="determinis"):
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2))
    found: list[dict[str, Any]] = train_on_ranks(values, 2)["metrics"]
    return found


@pytest.mark.parametrize("recipe", ["qk_norm_cap", pytest.param("sigma_reparam", marks=pytest.mark.full)])
def test_steps_are_the_same_again(ranks: Ranks, recipe: str) -> None:
    config = make_config({"recipe": recipe, "dropout": 0.1}, precision={"dtype": "bf16"}, parallel={"tensor": 2})
    values = config.model_dump(mode="json")
    assert ranks.run(2, deterministic_steps, values) == ranks.run(2, deterministic_steps, values)
