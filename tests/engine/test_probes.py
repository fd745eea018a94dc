"""Every probe says the same on every layout of ranks as the plain model in one process."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_stable.config.schema import Config
from megatron_stable.optim.spam import age
from megatron_stable.stability.probes import PROBES, parse, places
from tests.engine.layouts import (
    GLOBAL,
    SEQUENCE,
    engine_on_rank,
    global_batches,
    initial_parameters,
    make_config,
    micro_batches,
)
from tests.harness.ranks import Ranks
from tests.reference.probes import measure_training

STEPS = 3
LOGGING = {
    "probes_every": 1, "probe_positions": 5, "probe_heads": True, "histograms_every": 1, "flight_recorder": STEPS,
}  # fmt: skip
Case = dict[str, Any]
CASES: dict[str, tuple[int, Case, Case]] = {
    "alone": (1, {}, {}),
    "tp2": (2, {"bias": True}, {"tensor": 2}),
    "tp2-sp-swiglu": (2, {"activation": "swiglu", "kv_heads": 2}, {"tensor": 2, "sequence": True}),
    "tp4-dp2-capped": (8, {"recipe": "qk_norm_cap", "final_logit_cap": 5.0}, {"tensor": 4}),
    "tp4-pp2-sp": (8, {"recipe": "peri_ln"}, {"tensor": 4, "pipeline": 2, "sequence": True}),
    "tp2-pp2-dp2-sp-tied": (
        8,
        {"tied_embeddings": True, "activation_checkpointing": "full"},
        {"tensor": 2, "pipeline": 2, "sequence": True},
    ),
    "pp2-dp2-deepnorm": (4, {"recipe": "deepnorm", "activation_checkpointing": 2}, {"pipeline": 2}),
    "dp4-zero2": (4, {"kv_heads": 1, "positions": "learned"}, {"zero_stage": 2}),
    "tp2-dp2-zero2-sigma": (4, {"recipe": "sigma_reparam"}, {"tensor": 2, "zero_stage": 2}),
    "tp2-dp2-zero3": (4, {"recipe": "olmo2", "layer_scale": 0.3}, {"tensor": 2, "zero_stage": 3}),
}


def measured_on_rank(values: dict[str, Any], steps: int) -> dict[str, Any]:
    """On a rank: what the probes say after each step, and what the recorder has in the end."""
    from megatron_stable.optim.schedule import learning_rate

    with engine_on_rank(values) as engine:
        config, topology, found = engine.config, engine.topology, []
        for step, tokens in enumerate(global_batches(steps), start=1):
            batch = micro_batches(tokens, config, topology)
            engine.train_step(step, batch, learning_rate(config, step), measured=True, histograms=True)
            engine.evaluate([batch])  # no step, and so not measured
            found.append(engine.probes.last())
        return {"steps": found, "flight": engine.probes.flight(), "histograms": engine.probes.histograms()}


def configured(model: Case, parallel: Case, dtype: str = "fp32", **logging: Any) -> Config:
    return make_config(
        model, parallel=parallel, logging={**LOGGING, **logging},
        precision={"dtype": dtype, "initial_scale_power": 8},
    )  # fmt: skip


def expected(config: Config) -> list[dict[str, float]]:
    batches = [(tokens[:, :-1], tokens[:, 1:]) for tokens in global_batches(STEPS)]
    return measure_training(initial_parameters(config), batches, config)


def close(tag: str, value: float | None, reference: float, rel: float, share: float) -> bool:
    if parse(tag).probe.unit == "share":  # type: ignore[union-attr]
        return value == pytest.approx(reference, abs=share)
    return value == pytest.approx(reference, rel=rel, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_every_probe_says_what_the_plain_model_says(ranks: Ranks, case: str) -> None:
    world, model, parallel = CASES[case]
    config = configured(model, parallel)
    result = ranks.run(world, measured_on_rank, config.model_dump(mode="json"), STEPS)[0]
    for found, reference in zip(result["steps"], expected(config), strict=True):
        assert {tag for tag, value in found.items() if value is not None} == set(reference)
        wrong = {
            tag: (found[tag], value)
            for tag, value in reference.items()
            if not close(tag, found[tag], value, rel=1e-2 if tag == "noise_scale" else 2e-4, share=1e-3)
        }
        assert not wrong
    assert result["flight"] == list(enumerate(result["steps"], start=1))
    for tag, counts in result["histograms"].items():
        rms = result["steps"][-1][tag.replace("histogram", "rms")]
        rough = sum(n * 2.0 ** (2 * i - 63) for i, n in enumerate(counts)) / sum(counts)  # 2^(n + 1/2) for all of one
        assert sum(counts) % (GLOBAL * SEQUENCE) == 0 and rms == pytest.approx(rough**0.5, rel=0.3), tag


def test_the_plain_model_knows_every_probe_of_the_table() -> None:
    config = configured({}, {})
    table = {where.tag for probe in PROBES.values() for where in places(probe, config.model.layers, config.model.heads)}
    assert set(expected(config)[-1]) == table


@pytest.mark.parametrize(
    "dtype, parallel, rel", [("bf16", {"tensor": 2}, 0.1), ("bf16", {"zero_stage": 2}, 0.1), ("fp16", {}, 0.02)]
)
def test_in_half_precision_they_say_the_same_but_for_rounding(
    ranks: Ranks, dtype: str, parallel: Case, rel: float
) -> None:
    config = configured({"recipe": "qk_norm_cap"}, parallel, dtype)
    result = ranks.run(2, measured_on_rank, config.model_dump(mode="json"), STEPS)[0]
    for found, reference in zip(result["steps"], expected(config), strict=True):
        noisy = {"noise_scale", "logits/mean"}  # differences of large numbers
        wrong = {
            tag: (found[tag], value)
            for tag, value in reference.items()
            if tag not in noisy and not close(tag, found[tag], value, rel, share=0.1)
        }
        assert not wrong


def test_moments_that_begin_anew_are_young_again() -> None:
    assert [age(n, None) for n in (1, 2, 100)] == [1, 2, 100]
    assert [age(n, 10) for n in (1, 9, 10, 11, 19, 20)] == [1, 9, 1, 2, 10, 1]
    assert [age(n, 10, moments_from=8) for n in (9, 10, 11)] == [1, 1, 2]


def skipped_on_rank(values: dict[str, Any]) -> dict[str, Any]:
    """On a rank: what the probes say of steps whose updates are not made: refused, and overflown."""
    from megatron_stable.engine.outcome import Refused

    with engine_on_rank(values) as engine:
        batch = micro_batches(global_batches(1)[0], engine.config, engine.topology)
        engine.train_step(1, batch, 1e-3, measured=True)
        engine.train_step(2, batch, 1e-3, lambda metrics: Refused(), measured=True)
        refused = engine.probes.last()
        weight = next(iter(engine.module.parameters()))
        handle = weight.register_hook(lambda grad: grad * float("inf"))
        engine.train_step(3, batch, 1e-3, measured=True)
        handle.remove()
        return {"refused": refused, "overflown": engine.probes.last()}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_steps_without_an_update_have_none_and_no_tag_that_does_not_apply(ranks: Ranks, dtype: str) -> None:
    config = configured({"tied_embeddings": True}, {}, dtype)
    found = ranks.run(1, skipped_on_rank, config.model_dump(mode="json"))[0]
    refused, overflown = found["refused"], found["overflown"]
    assert refused["update_rms/embedding"] == 0 and refused["grad_rms/embedding"] > 0
    assert refused["moment_rms/embedding"] is None
    assert overflown["output_norm/qkv/layer_00"] > 0
    assert overflown["grad_rms/embedding"] is None
    assert not [tag for tag in (*refused, *overflown) if tag.endswith("/head")], "it is the embedding"
