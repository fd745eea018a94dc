"""The parts of the rules: shards, statistics of clipping, resets, mu-centering, QK-Clip, multipliers, conflicts."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_stable.config.checks import conflicts
from megatron_stable.config.parametrization import depth_ratio, model_multipliers, optimizer_multipliers, width_ratio
from megatron_stable.config.schema import Config, OptimizerConfig
from megatron_stable.optim import spam
from megatron_stable.optim.adamw import Flat
from megatron_stable.optim.centering import center_
from megatron_stable.optim.clipping import ZClip, build_clipping
from megatron_stable.optim.groups import kind
from megatron_stable.optim.partition import LocalShard, Partition, row_blocks
from megatron_stable.optim.qk_clip import qk_clip_, row_factors
from megatron_stable.optim.schedule import learning_rate
from megatron_stable.parallel.shards import Init, Place


def config_of(optimizer: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **sections: Any) -> Config:
    shape = {"size": None, "layers": 8, "hidden": 64, "heads": 4, "sequence_length": 8, "vocab_size": 20}
    return Config.model_validate({"model": {**shape, **(model or {})}, "optimizer": optimizer or {}, **sections})


def cut(name: str, whole: Tensor, at: int, init: Init | None = None) -> tuple[Tensor, list[LocalShard]]:
    """A flat tensor with a parameter in it, and the parameter's two shards, as two ranks would have them."""
    place = Place(tuple(whole.shape), 0, 0, len(whole), init or Init(), name)
    flat = torch.cat([torch.zeros(3), whole.flatten(), torch.zeros(2)])
    n = whole.numel()
    return flat, [LocalShard(place, 0, at, flat, 3), LocalShard(place, at, n - at, flat, 3 + at)]


@settings(deadline=None)
@given(rows=st.integers(1, 6), width=st.integers(1, 5), data=st.data())
def test_row_blocks_are_the_elements_where_they_belong(rows: int, width: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, rows * width))
    stop = data.draw(st.integers(start, rows * width))
    matrix, seen = torch.arange(rows * width).view(rows, width), torch.zeros(rows, width)
    blocks = list(row_blocks(matrix.flatten()[start:stop], start, width))
    for row, column, block in blocks:
        where = (slice(row, row + block.shape[0]), slice(column, column + block.shape[1]))
        assert torch.equal(matrix[where], block)
        seen[where] += 1
    assert len(blocks) <= 3 and seen.flatten()[start:stop].eq(1).all() and seen.sum() == stop - start


def test_zclip_clips_outliers_and_forgets_them() -> None:
    chosen, rule = random.Random(0), ZClip(OptimizerConfig(clip_grad=0.0))
    for _ in range(200):
        rule.observe(1 + 0.1 * chosen.random())
        assert rule.divisor is None or rule.divisor < 1.1
    mean, std = rule.mean, math.sqrt(rule.variance)
    rule.observe(50.0)
    z = (50 - mean) / (std + 1e-6)
    assert rule.divisor and 50 / rule.divisor == pytest.approx(mean + 2.5**2 * std / z, rel=1e-5)
    assert rule.mean == pytest.approx(mean, rel=1e-2), "the spike itself must not enter the statistics"
    before = rule.state()
    for poison in (math.nan, math.inf):
        rule.observe(poison)
        assert rule.state() == before and rule.divisor is None


@pytest.mark.parametrize("clipping", ["zclip", "adagc"])
def test_statistics_survive_json(clipping: str) -> None:
    """Bit for bit, in the middle of the warm-up and after it."""
    config = OptimizerConfig(clipping=clipping, clipping_warmup=4)  # type: ignore[arg-type]
    flat, shards = cut("head.weight", torch.ones(4, 5), 20)
    partition = Partition(shards[:1])
    for stop in (2, 6):
        rules = [build_clipping(config), build_clipping(config)]
        chosen = random.Random(stop)
        for step in range(12):
            if step == stop:
                rules[1] = build_clipping(config)
                assert rules[0] and rules[1]
                assert rules[1].load(type(rules[0].state()).model_validate_json(rules[0].state().model_dump_json()))
            norm = chosen.expovariate(1.0)
            for rule in rules:
                assert rule
                rule.observe(norm)
                grad = torch.full_like(flat, norm)
                rule.scale([Flat(flat, grad, {}, {})], partition)
            assert rules[0] and rules[1] and rules[0].state() == rules[1].state()


def test_spam_does_not_freeze_what_has_no_second_moment_yet() -> None:
    grad = torch.tensor([1e-3, -2.0, 1.0])
    spam.clip_spikes_(grad, torch.tensor([0.0, 1e-4, 1.0]), 5000.0)
    assert grad.tolist() == pytest.approx([1e-3, -(0.5**0.5), 1.0])


def test_spam_resets_and_warms_up() -> None:
    assert [t for t in range(1, 60) if spam.resets(t, 25)] == [25, 50]
    assert not any(spam.resets(t, None) for t in range(1, 60))
    assert [t for t in range(1, 60) if spam.clips_spikes(t, 25)] == [*range(20, 25), *range(45, 50)]
    assert [t for t in range(1, 60) if not spam.clips_spikes(t, None)] == list(range(1, 20))
    factors = [spam.rate_factor(t, 25, 10) for t in range(1, 60)]
    assert factors[:24] == [1.0] * 24 and factors[34:49] == [1.0] * 15
    rising = factors[24:34]
    assert rising[0] == pytest.approx(1 - 0.99 * (1 + math.cos(math.pi / 11)) / 2) and rising[0] < 0.04
    assert rising == sorted(rising) and rising[-1] < 1


@settings(deadline=None)
@given(at=st.integers(0, 7 * 6), real=st.integers(1, 7))
def test_centering_leaves_the_softmax_and_the_padding_as_they_are(at: int, real: int) -> None:
    """Vocabulary of ``real`` words in 7 rows; the two shards play the two ranks by way of each other's sums."""
    generator = torch.Generator().manual_seed(at)
    whole = torch.randn(7, 6, generator=generator) + 3
    whole[real:] = 0
    flat, shards = cut("head.weight", whole, at, Init(rows=real))
    sums: list[Tensor] = []

    class Peers(Partition):
        def reduce(self, value: Tensor) -> Tensor:
            sums.append(value.clone())
            return sum(sums[:2], torch.zeros(6)) if len(sums) > 2 else value

    untouched = flat.clone()
    for shard in shards:  # each one's sum, without effect
        center_(Peers([shard]), 0)
        flat.copy_(untouched)
    for shard in shards:
        center_(Peers([shard]), 0)
    centred = flat[3:-2].view(7, 6)
    torch.testing.assert_close(centred[:real], whole[:real] - whole[:real].mean(0), rtol=1e-5, atol=1e-6)
    assert not centred[real:].any() and not flat[:3].any() and not flat[-2:].any()
    hidden = torch.randn(5, 6, generator=generator)
    before, after = ((hidden @ w[:real].T).softmax(-1) for w in (whole, centred))
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-6)


@settings(deadline=None)
@given(at=st.integers(0, 32 * 8), alpha=st.floats(0.0, 1.0), kv_heads=st.sampled_from([1, 2, 4]))
def test_qk_clip_bounds_each_head_and_leaves_the_others(at: int, alpha: float, kv_heads: int) -> None:
    """Logits of heads beyond the threshold shrink to it; of those within it, none changes, also in a shared group."""
    model = config_of(model={"hidden": 16, "heads": 4, "kv_heads": kv_heads}).model
    queries, rows = 4 // kv_heads, kv_heads * (4 // kv_heads + 2) * 4
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(rows, 16, generator=generator), torch.randn(9, 16, generator=generator)

    def logits(w: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (x @ w.T).view(9, kv_heads, queries + 2, 4).split((queries, 1, 1), dim=2)
        return torch.einsum("sgqd,tgd->gqst", q, k[:, :, 0]).flatten(0, 1) / 2, v

    before, values = logits(weight)
    largest = before.amax((1, 2))
    threshold = float(largest.median())
    flat, shards = cut("blocks.3.attention.qkv.weight", weight, min(at, weight.numel()))
    for shard in shards:
        qk_clip_(Partition([shard]), [flat], {"blocks.3": largest}, model, threshold, alpha)
        qk_clip_(Partition([shard]), [flat], {"blocks.2": largest}, model, threshold / 9, alpha)
    after, untouched = logits(flat[3:-2].view(rows, 16))
    for head in range(4):
        factor = min(1.0, threshold / float(largest[head]))
        torch.testing.assert_close(after[head], before[head] * factor, rtol=1e-4, atol=1e-5)
    assert torch.equal(values, untouched)
    assert float(after.max()) <= threshold * 1.0001


def test_qk_clip_splits_the_factor_by_alpha() -> None:
    model = config_of(model={"hidden": 16, "heads": 4}).model
    weight = torch.ones(4 * 3 * 4, 16)
    flat, shards = cut("blocks.0.attention.qkv.weight", weight, weight.numel())
    qk_clip_(Partition(shards[:1]), [flat], {"blocks.0": torch.tensor([400.0, 50.0, -3.0, 0.0])}, model, 100.0, 0.25)
    factors = flat[3:-2].view(4, 3, 4, 16)[:, :, 0, 0]
    torch.testing.assert_close(factors[0], torch.tensor([0.25**0.25, 0.25**0.75, 1.0]))
    assert torch.equal(factors[1:], torch.ones(3, 3))
    broken = torch.tensor([torch.inf, -torch.inf, torch.nan, 99.0])  # such heads are left alone
    assert torch.equal(row_factors(broken, model), torch.ones(4 * 3 * 4))
    flat, shards = cut("blocks.0.attention.qkv.bias", torch.ones(4 * 3 * 4), 5)
    for shard in shards:
        qk_clip_(Partition([shard]), [flat], {"blocks.0": torch.tensor([400.0, 50.0, -3.0, 0.0])}, model, 100.0, 0.25)
    assert torch.equal(flat[3:-2].view(4, 3, 4)[:, :, 0], factors)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("embedding.weight", (20, 8), "embeddings"),
        ("positions.weight", (20, 8), "embeddings"),
        ("head.weight", (20, 8), "head"),
        ("blocks.0.mlp.fc1.weight", (2, 8, 8), "matrices"),
        ("blocks.0.mlp.fc1.bias", (2, 8), "biases"),
        ("blocks.0.attention.q_norm.weight", (8,), "norms"),
    ],
)
def test_kinds(name: str, shape: tuple[int, ...], expected: str) -> None:
    assert kind(Place(shape, name=name)) == expected


def test_multipliers_follow_the_table() -> None:
    m, d = 64 / 16, 8 / 2
    scaled = {"base_width": 16}
    rates = {}
    for name in ("standard", "mu_simple", "mu_full", "complete_p"):
        config = config_of({"parametrization": name, **(scaled if name != "standard" else {})})
        rates[name] = [
            optimizer_multipliers(config, what, True).learning_rate for what in ("matrices", "head", "norms")
        ]
    assert rates == {
        "standard": [1, 1, 1],
        "mu_simple": [1 / m, 1 / m, 1],
        "mu_full": [1 / m, 1 / m, 1],
        "complete_p": [1 / m, 1, 1],
    }
    complete = config_of({"parametrization": "complete_p", **scaled})
    assert (width_ratio(complete), depth_ratio(complete)) == (m, d)
    assert optimizer_multipliers(complete, "matrices", True).weight_decay == m
    assert optimizer_multipliers(complete, "biases", True).eps == 1 / (m * d)
    assert optimizer_multipliers(complete, "norms", False).eps == 1 / m
    found = model_multipliers(complete)
    assert (found.attention_scale, found.residual, found.logits, found.matrix_std) == (1 / 16, 1 / d, 1 / m, m**-0.5)
    full = model_multipliers(config_of({"parametrization": "mu_full", **scaled}))
    assert (full.attention_scale, full.head_std, full.zero_query) == (1 / 16, m**-0.5, True)
    assert model_multipliers(config_of()).attention_scale == 1 / 4
    at_base = config_of({"parametrization": "complete_p", "base_width": 64, "base_depth": 8})
    assert optimizer_multipliers(at_base, "matrices", True) == optimizer_multipliers(config_of(), "matrices", True)


@settings(deadline=None)
@given(tokens=st.integers(0, 10**6), size=st.integers(1, 64))
def test_warmup_in_tokens_ends_with_the_step_that_reaches_them(tokens: int, size: int) -> None:
    config = config_of(batch={"global_size": size}, schedule={"warmup_tokens": tokens, "kind": "constant"})
    steps = config.warmup_steps
    assert (steps - 1) * size * 8 < tokens <= steps * size * 8 or steps == tokens == 0
    peak = config.optimizer.learning_rate
    assert learning_rate(config, steps + 1) == peak
    if steps:
        assert learning_rate(config, steps) == pytest.approx(peak) and learning_rate(config, 1) == pytest.approx(
            peak / steps
        )


CONFLICTS: dict[str, tuple[Config, list[str]]] = {
    "two warm-ups": (
        config_of(schedule={"warmup_tokens": 1000, "warmup_steps": 5}),
        ["schedule.warmup_tokens 1000", "schedule.warmup_steps 5", "leave one"],
    ),
    "warm-up beyond the end": (
        config_of(schedule={"warmup_tokens": 200_000}, run={"steps": 1000}),
        ["schedule.warmup_tokens 200000 (1563 steps)", "run.steps 1000", "below 128000"],
    ),
    "clipping parameters": (
        config_of({"clipping_threshold": 3.0}),
        ["optimizer.clipping_threshold 3.0", "optimizer.clipping global_norm", "zclip or adagc", "=null"],
    ),
    "momentum": (
        config_of({"muon_momentum": 0.8}),
        ["optimizer.muon_momentum 0.8", "optimizer.name adamw", "muon"],
    ),
    "muon, spam": (
        config_of({"name": "muon", "spike_threshold": 5000}),
        ["optimizer.spike_threshold 5000", "optimizer.name muon", "adamw or stable_adamw"],
    ),
    "muon, reset": (
        config_of({"name": "muon", "momentum_reset_every": 500}),
        ["optimizer.momentum_reset_every 500", "optimizer.name muon"],
    ),
    "reset, warm-up": (
        config_of({"momentum_reset_every": 100}),
        ["optimizer.momentum_reset_warmup 150", "optimizer.momentum_reset_every 100"],
    ),
    "warm-up without reset": (
        config_of({"momentum_reset_warmup": 10}),
        ["optimizer.momentum_reset_warmup 10", "optimizer.momentum_reset_every null"],
    ),
    "muon, parametrization": (
        config_of({"name": "muon", "parametrization": "mu_simple"}),
        ["optimizer.parametrization mu_simple", "optimizer.name muon"],
    ),
    "base width": (
        config_of({"base_width": 128}),
        ["optimizer.base_width 128", "optimizer.parametrization standard"],
    ),
    "base depth": (
        config_of({"base_depth": 3, "parametrization": "mu_full"}),
        ["optimizer.base_depth 3", "optimizer.parametrization mu_full"],
    ),
    "complete_p, init": (
        config_of({"parametrization": "complete_p"}),
        ["optimizer.parametrization complete_p", "model.init fixed", "model.init=fixed"],
    ),
    "mu, init": (
        config_of({"parametrization": "mu_simple"}, {"init": "fixed"}),
        ["optimizer.parametrization mu_simple", "model.init fan_in", "is fixed"],
    ),
    "independent, no rate": (
        config_of({"independent_weight_decay": True, "learning_rate": 0.0}, schedule={"kind": "constant"}),
        ["optimizer.independent_weight_decay true", "optimizer.learning_rate", "above 0"],
    ),
    "no decay, tied": (
        config_of({"no_decay": ["embeddings"]}, {"tied_embeddings": True}),
        ["optimizer.no_decay ['embeddings']", "model.tied_embeddings true"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFLICTS)
def test_contradictions_name_both_fields_and_the_remedy(case: str) -> None:
    config, parts = CONFLICTS[case]
    found = [problem for problem in conflicts(config) if all(part in problem.message for part in parts)]
    assert len(found) == 1 and len(found[0].keys) >= 2, [problem.message for problem in conflicts(config)]
    assert all(key.split(".")[0] in Config.model_fields for key in found[0].keys)


def test_what_goes_together_is_allowed() -> None:
    together = {"name": "stable_adamw", "clipping": "zclip", "clipping_warmup": 9, "spike_threshold": 5000,
                "momentum_reset_every": 500, "independent_weight_decay": True, "mu_centering": True,
                "no_decay": ["norms", "biases", "embeddings", "head"]}  # fmt: skip
    assert not conflicts(config_of(together, {"tied_embeddings": True}))
    assert not conflicts(config_of({"parametrization": "complete_p", "base_depth": 4}, {"init": "fixed"}))
    assert not conflicts(config_of({"name": "muon", "muon_momentum": 0.9, "clipping": "adagc", "clipping_decay": 0.9}))


def test_statistics_can_be_saved_right_after_they_were_loaded() -> None:
    """As when the first steps after a rollback are dropped, into a rule that had statistics of its own."""
    config = OptimizerConfig(clipping="adagc", clipping_warmup=4)
    flat, shards = cut("head.weight", torch.ones(4, 5), 20)
    partition, rule = Partition(shards[:1]), build_clipping(config)
    assert rule is not None
    flat.grad = torch.ones_like(flat)
    rule.observe(1.0)
    rule.scale([Flat(flat, flat.grad, {}, {})], partition)
    stored = rule.state()
    assert rule.load(stored)
    assert rule.state() == stored
