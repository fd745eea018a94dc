"""Every rule gives the same parameters on every layout: those of its formula on full tensors."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from megatron_stable.config.checks import conflicts
from megatron_stable.config.schema import Config
from tests.engine.layouts import assemble, global_batches, initial_parameters, make_config, train_on_ranks, unpadded
from tests.harness.ranks import Ranks
from tests.optim.formulas import train

STEPS, QUIET = 4, 2
Values = dict[str, Any]
# clipping bounds are such that they bind, see test_the_rules_bind
RULES: dict[str, tuple[Values, Values]] = {
    "stable_adagc_centred": (
        {"name": "stable_adamw", "betas": [0.9, 0.999], "clipping": "adagc", "clipping_warmup": 2, "clip_grad": 0.5,
         "clipping_threshold": 0.9, "clipping_decay": 0.9, "mu_centering": True, "no_decay": ["biases", "embeddings"]},
        {"bias": True, "positions": "learned"},
    ),
    "muon_zclip_centred": (
        {"name": "muon", "clipping": "zclip", "clipping_warmup": 2, "clipping_threshold": 0.1, "clipping_decay": 0.1,
         "clip_grad": 3.0, "mu_centering": True, "learning_rate": 0.01},
        {"kv_heads": 2, "activation": "swiglu", "norm": "rmsnorm", "qk_norm": True},
    ),
    "adamw_spam_independent_mu": (
        {"name": "adamw", "spike_threshold": 1.5, "momentum_reset_every": 3, "momentum_reset_warmup": 2,
         "independent_weight_decay": True, "parametrization": "mu_simple", "base_width": 16, "mu_centering": True},
        {"tied_embeddings": True},
    ),
}  # fmt: skip
# tensor, pipeline, data, sequence, zero_stage, dtype
LAYOUTS = {
    "tp4_zero1": (4, 1, 1, False, 1, "fp32"),
    "tp2_sp_dp2_zero1": (2, 1, 2, True, 1, "fp32"),
    "tp2_pp2_zero1": (2, 2, 1, False, 1, "fp32"),
    "pp2_dp2_zero1_bf16": (1, 2, 2, False, 1, "bf16"),
    "dp2_zero2_fp16": (1, 1, 2, False, 2, "fp16"),
    "tp2_dp2_zero3": (2, 1, 2, False, 3, "fp32"),
}


def config_of(rule: str, layout: str) -> Config:
    optimizer, model = RULES[rule]
    tensor, pipeline, _, sequence, stage, dtype = LAYOUTS[layout]
    parallel = {"tensor": tensor, "pipeline": pipeline, "sequence": sequence, "zero_stage": stage}
    return make_config(
        model, optimizer=optimizer, parallel=parallel, precision={"dtype": dtype, "initial_scale_power": 10}
    )


def all_rules_on_ranks(configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """On a rank: one training after the other."""
    from megatron_stable.optim import spam

    spam.QUIET = QUIET
    return [train_on_ranks(values, STEPS) for values in configs]


@lru_cache(maxsize=8)
def reference(rule: str) -> Any:
    config = config_of(rule, "tp4_zero1")
    return train(config, initial_parameters(config), global_batches(STEPS), QUIET)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_are_those_of_the_formula(ranks: Ranks, layout: str) -> None:
    tensor, pipeline, data, *_, dtype = LAYOUTS[layout]
    configs = {rule: config_of(rule, layout) for rule in RULES}
    configs = {rule: config for rule, config in configs.items() if not conflicts(config)}  # 2 groups of heads, TP 4
    assert len(configs) >= 2
    values = [config.model_dump(mode="json") for config in configs.values()]
    results = ranks.run(tensor * pipeline * data, all_rules_on_ranks, values)
    for number, (rule, config) in enumerate(configs.items()):
        parameters, norms = reference(rule)
        start = initial_parameters(config)
        bound = {"fp32": 2e-4, "fp16": 0.03, "bf16": 0.15}[dtype]
        if rule.startswith("muon") and dtype != "fp32":
            bound = 0.4  # Newton-Schulz magnifies what rounding does to small singular values, see newton_schulz
        got = assemble([result[number] for result in results])
        assert [m["grad_norm"] for m in results[0][number]["metrics"]] == pytest.approx(
            norms, rel={"fp32": 1e-4, "fp16": 5e-3, "bf16": 3e-2}[dtype]
        )
        for name, value in got.items():
            moved = (parameters[name] - start[name]).norm() + 1e-3 * value.numel() ** 0.5 * 1e-2
            error = float((unpadded(name, value).double() - parameters[name]).norm() / moved)
            assert error < bound, f"{rule}: the update of {name} is off by {error:.2e}"
            assert not value[61:].any() or name not in ("embedding.weight", "head.weight"), "padding has moved"


@pytest.mark.parametrize("rule", RULES)
def test_the_rules_bind(rule: str) -> None:
    """Each of the options makes a difference in these few steps, else the test above would not see it broken."""
    optimizer, _ = RULES[rule]
    expected, _ = reference(rule)
    config = config_of(rule, "tp4_zero1")
    keys = ("clipping", "mu_centering", "spike_threshold", "momentum_reset_every", "independent_weight_decay",
            "parametrization", "no_decay", "name")  # fmt: skip
    for key in keys:
        if key in optimizer:
            values = config.optimizer.model_dump() | {key: Config().optimizer.model_dump()[key]}
            if values["name"] == optimizer["name"] == "adamw" and key == "name":
                continue
            changed = config.model_copy(update={"optimizer": type(config.optimizer).model_validate(values)})
            other, _ = train(changed, initial_parameters(config), global_batches(STEPS), QUIET)
            assert any(not torch.allclose(other[n], expected[n], rtol=1e-4, atol=1e-6) for n in expected), key
