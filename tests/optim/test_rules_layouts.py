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
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Values = dict[str, Any]
# optimizer, model, other sections; clipping bounds are such that they bind, see test_the_rules_bind
RULES: dict[str, tuple[Values, Values, Values]] = {
    "stable_adagc_centred_qk_clip": (
        {"name": "stable_adamw", "betas": [0.9, 0.999], "clipping": "adagc", "clipping_warmup": 2, "clip_grad": 0.5,
         "clipping_threshold": 0.9, "clipping_decay": 0.9, "mu_centering": True, "no_decay": ["biases", "embeddings"],
         "qk_clip": 1.5, "qk_clip_alpha": 0.3},
        {"bias": True, "positions": "learned", "activation_checkpointing": "full"},
        {"schedule": {"kind": "linear", "min_learning_rate": 1e-3}},
    ),
    "muon_zclip_centred_qk_clip": (
        {"name": "muon", "clipping": "zclip", "clipping_warmup": 2, "clipping_threshold": 0.1, "clipping_decay": 0.1,
         "clip_grad": 2.0, "mu_centering": True, "learning_rate": 0.01, "muon_momentum": 0.9, "qk_clip": 0.4,
         "no_decay": ["embeddings"]},
        {"heads": 8, "kv_heads": 4, "activation": "swiglu", "norm": "rmsnorm", "v_norm": True,
         "attention_temperature": 2.0, "init": "fixed", "init_std": 0.1},
        {},
    ),
    "adamw_spam_independent_mu": (
        {"name": "adamw", "spike_threshold": 1.5, "momentum_reset_every": 3, "momentum_reset_warmup": 2,
         "independent_weight_decay": True, "parametrization": "mu_simple", "base_width": 16, "mu_centering": True},
        {"tied_embeddings": True},
        {"schedule": {"kind": "inverse_sqrt"}},
    ),
    "adamw_mu_full_tokens": (
        {"parametrization": "mu_full", "base_width": 8, "no_decay": ["norms", "biases", "head"]},
        {"attention_temperature": 2.0, "rope_theta": 100.0, "norm_eps": 1e-3, "ffn_hidden": 40},
        {"schedule": {"kind": "constant", "warmup_steps": 100, "warmup_tokens": 200}, "loss": {"mu_loss": 10.0}},
    ),
    "adamw_complete_p_wsd": (
        {"parametrization": "complete_p", "base_width": 8, "base_depth": 1, "weight_decay": 0.5,
         "no_decay": ["embeddings"], "clip_grad": 0.05},
        {"init": "fixed", "init_std": 0.05, "layer_scale": 0.5},
        {"schedule": {"kind": "wsd", "decay_fraction": 0.5, "warmup_steps": 1, "rewarm": [1, 3]}},
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
    "pp2_zero1_fp16": (1, 2, 1, False, 1, "fp16"),
    # what remains of TP 1, 2, 4 x PP 1, 2 x SP off, on
    "tp1": (1, 1, 1, False, 1, "fp32"),
    "tp2": (2, 1, 1, False, 1, "fp32"),
    "tp4_sp": (4, 1, 1, True, 1, "fp32"),
    "pp2": (1, 2, 1, False, 1, "fp32"),
    "tp2_pp2_sp": (2, 2, 1, True, 1, "fp32"),
    "tp4_pp2": (4, 2, 1, False, 1, "fp32"),
    "tp4_pp2_sp": (4, 2, 1, True, 1, "fp32"),
}
IMPOSSIBLE = {"tp2_dp2_zero3": ["adamw_mu_full_tokens"]}  # mu-loss needs the whole output embedding
# The others are for `make test-all`. In muon, mu_full and complete_p the stages have different groups of parameters
QUICK = {
    **dict.fromkeys(["pp2_dp2_zero1_bf16", "dp2_zero2_fp16", "tp2_dp2_zero3"], [*RULES][:3]),
    "tp2_sp_dp2_zero1": [*RULES][3:],
    "tp2_pp2_zero1": [*RULES],
    "pp2_zero1_fp16": [*RULES][1:],
}


def config_of(rule: str, layout: str) -> Config:
    optimizer, model, sections = RULES[rule]
    tensor, pipeline, _, sequence, stage, dtype = LAYOUTS[layout]
    parallel = {"tensor": tensor, "pipeline": pipeline, "sequence": sequence, "zero_stage": stage}
    precision = {"dtype": dtype, "initial_scale_power": 10}
    return make_config(model, optimizer=optimizer, parallel=parallel, precision=precision, **sections)


def all_rules_on_ranks(configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """On a rank: one training after the other."""
    from megatron_stable.optim import spam

    spam.QUIET = QUIET
    return [train_on_ranks(values, STEPS) for values in configs]


@lru_cache(maxsize=8)
def reference(rule: str) -> Any:
    config = config_of(rule, "tp1")
    return train(config, initial_parameters(config), global_batches(STEPS), QUIET)


CASES = [pytest.param(layout, rules, id=layout) for layout, rules in QUICK.items()] + [
    pytest.param(layout, rest, id=f"{layout}-rest", marks=pytest.mark.full)
    for layout in LAYOUTS
    if (rest := [rule for rule in RULES if rule not in (*QUICK.get(layout, ()), *IMPOSSIBLE.get(layout, ()))])
]


@pytest.mark.parametrize(("layout", "rules"), CASES)
def test_parameters_are_those_of_the_formula(ranks: Ranks, layout: str, rules: list[str]) -> None:
    tensor, pipeline, data, *_, dtype = LAYOUTS[layout]
    configs = {rule: config_of(rule, layout) for rule in rules if rule not in IMPOSSIBLE.get(layout, ())}
    assert not [problem for config in configs.values() for problem in conflicts(config)]
    values = [config.model_dump(mode="json") for config in configs.values()]
    results = ranks.run(tensor * pipeline * data, all_rules_on_ranks, values, timeout=280)
    for number, (rule, config) in enumerate(configs.items()):
        parameters, norms = reference(rule)
        start = initial_parameters(config)
        bound = {"fp32": 2e-4, "fp16": 0.03, "bf16": 0.15}[dtype]
        if rule.startswith("muon") and dtype != "fp32":
            bound = 0.4  # Newton-Schulz magnifies what rounding does to small singular values, see newton_schulz
        got = assemble([result[number] for result in results])
        assert set(got) == set(parameters)
        assert [m["grad_norm"] for m in results[0][number]["metrics"]] == pytest.approx(
            norms, rel={"fp32": 1e-4, "fp16": 1e-2, "bf16": 3e-2}[dtype]
        )
        for name, value in got.items():
            moved = (parameters[name] - start[name]).norm() + 1e-3 * value.numel() ** 0.5 * 1e-2
            # DeepSpeed makes the masters from the weights in half precision: what that rounds off is no update
            rounded_off = start[name] - start[name].to(DTYPES[dtype])
            error = float((unpadded(name, value).double() + rounded_off - parameters[name]).norm() / moved)
            assert error < bound, f"{rule}: the update of {name} is off by {error:.2e}"
            assert not value[61:].any() or name not in ("embedding.weight", "head.weight"), "padding has moved"


@pytest.mark.parametrize("rule", RULES)
def test_the_rules_bind(rule: str) -> None:
    """Each of the options makes a difference in these few steps, else the test above would not see it broken."""
    optimizer, _, sections = RULES[rule]
    expected, _ = reference(rule)
    config = config_of(rule, "tp1")
    start = initial_parameters(config)
    for section, key in [
        *(("optimizer", key) for key in optimizer),
        *((s, key) for s in sections for key in sections[s]),
    ]:
        values = getattr(config, section).model_dump()
        default = getattr(Config(), section).model_dump()[key]
        if values[key] != default and not key.startswith(("clipping_", "learning_rate")):
            changed = config.model_copy(update={section: type(getattr(config, section))(**values | {key: default})})
            other, _ = train(changed, start, global_batches(STEPS), QUIET)
            assert any(not torch.allclose(other[n], expected[n], rtol=1e-4, atol=1e-6) for n in expected), key
