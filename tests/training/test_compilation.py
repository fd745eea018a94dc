"""By default blocks are compiled where a small one, tried on the spot, comes out like the plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packaging.version import Version
from torch._inductor import config as inductor

from megatron_stable.config.schema import Config, DataConfig
from megatron_stable.model import block
from megatron_stable.training.compilation import GRAPHS, choose_compilation, try_out, why_not

CPU = torch.device("cpu")


def config(**sections: Any) -> Config:
    model = {"vocab_size": 512, "hidden": 64, "heads": 4, "recipe": "qk_norm", **sections.pop("model", {})}
    return Config.model_validate({"model": model, **sections})


@pytest.fixture(autouse=True)
def afresh() -> None:
    torch._dynamo.reset()


SOME = {"recipe": "sigma_reparam", "kv_heads": 2, "activation": "swiglu"}
OTHERS = [{"recipe": recipe} for recipe in ("baseline", "qk_norm", "qk_norm_cap", "olmo2", "deepnorm", "gemma2")]


@pytest.mark.parametrize("model", [SOME, *(pytest.param(other, marks=pytest.mark.full) for other in OTHERS)])
def test_a_small_block_comes_out_right(model: dict[str, Any]) -> None:
    if model is SOME and Version(torch.__version__) < GRAPHS:
        pytest.skip("PyTorch 2.11 compiles it into something else on a CPU, as the trial finds")
    assert try_out(config(model=model), CPU) is None


def test_without_a_compiler_the_reason_is_told() -> None:
    with inductor.patch({"cpp.cxx": ("/no/such/compiler",), "force_disable_caches": True}):
        problem = try_out(config(), CPU)
    assert problem is not None and problem.startswith("torch.compile does not work here (")


def test_a_block_that_is_compiled_into_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = block.Block._forward

    def dishonest(self: Any, x: torch.Tensor, documents: Any) -> torch.Tensor:
        return honest(self, x, documents) * (1.01 if torch.compiler.is_compiling() else 1.0)

    monkeypatch.setattr(block.Block, "_forward", dishonest)
    problem = try_out(config(), CPU)
    assert problem is not None and problem.startswith("a compiled block computes something else")


def test_a_block_is_tried_with_documents_if_the_run_has_some() -> None:
    data = {"document_mask": True, "end_of_document": 0}
    assert try_out(config().model_copy(update={"data": DataConfig(**data)}), CPU) is None


@pytest.mark.parametrize(
    ("sections", "device", "reason"),
    [
        ({}, "cuda", None),
        ({}, "cpu", "there is no GPU"),
        ({"parallel": {"zero_stage": 3}}, "cuda", "ZeRO-3"),
        ({"run": {"deterministic": True}}, "cuda", "run.deterministic"),
    ],
)
def test_auto_compiles_on_a_gpu(sections: dict[str, Any], device: str, reason: str | None) -> None:
    found = why_not(config(**sections), device)
    assert found is None if reason is None else reason in (found or "")


@pytest.mark.parametrize("said", [True, False])
def test_what_the_configuration_says_is_done_unasked(said: bool) -> None:
    assert choose_compilation(config(model={"compile": said})) == (said, None)
