"""Machines, speed, durability and the search of layouts, against arithmetic by hand and against themselves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_stable.analysis.durability import checkpoint_bytes, durability
from megatron_stable.analysis.layouts import remedies, search
from megatron_stable.analysis.machines import MACHINES, machine
from megatron_stable.analysis.plan import make_plan
from megatron_stable.analysis.speed import data_link, speed
from megatron_stable.config.checks import conflicts
from megatron_stable.config.schema import Config
from megatron_stable.errors import ConfigError
from megatron_stable.training.flops import PEAKS, flops_per_token

H100 = MACHINES["h100"]


def run_of(size: str = "7b", **sections: dict[str, object]) -> Config:
    given: dict[str, dict[str, object]] = {
        "model": {"size": size, "vocab_size": 32000},
        "precision": {"dtype": "bf16"},
        "batch": {"global_size": 64, "micro_size": 1},
    }
    for name, fields in sections.items():
        given[name] = {**given.get(name, {}), **fields}
    return Config.model_validate(given)


def test_parameters_are_those_of_the_shape() -> None:
    """LayerNorm without biases: 12 h^2 and two norms a block; embedding, head, final norm."""
    found = make_plan(run_of("1b"), 8, H100)
    h, layers = 2048, 24
    assert found.outside_embeddings == layers * (12 * h * h + 2 * h) + h
    assert found.parameters == found.outside_embeddings + 2 * 32000 * h


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 4), (4, 2)])
def test_stages_and_slices_hold_the_model_once(tensor: int, pipeline: int) -> None:
    """But for norms, which TP replicates."""
    config = run_of("1b", parallel={"tensor": tensor, "pipeline": pipeline})
    found = make_plan(config, 8, H100)
    norms = (2 * 24 + 1) * 2048
    assert sum(stage.parameters for stage in found.stages) == (found.parameters - norms) // tensor + norms
    assert sum(stage.blocks for stage in found.stages) == 24


def test_presets_have_the_peaks_that_training_counts_with() -> None:
    for name, known in MACHINES.items():
        assert known.peak_flops["bf16"] == PEAKS[name.upper()]


def test_mfu_is_that_of_training() -> None:
    config = run_of("1b")
    found = speed(config, 8, H100)
    rate = found.tokens_per_second * flops_per_token(config.model)
    assert found.mfu == pytest.approx(rate / (8 * 989e12))
    assert found.tokens_per_second == pytest.approx(64 * 4096 / found.seconds)
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    # PaLM counts 12 L s h per token for attention, of which the causal half is half
    attention = 12 * 24 * 4096 * 2048 / flops_per_token(config.model)
    assert found.mfu_causal == pytest.approx(found.mfu * (1 - attention / 2))


def test_efficiencies_are_upper_bounds_of_what_is_predicted() -> None:
    """A machine that does all at its peak, and moves bytes for nothing, spends the FLOPs of the model and no more."""
    free = {"memory_bandwidth": 1e30, "link_in_node": 1e30, "link_between_nodes": 1e30, "launch_seconds": 0.0}
    perfect = H100.efficiency.model_copy(update={"gemm": 1.0, "attention": 1.0})
    found = speed(run_of("7b"), 8, H100.model_copy(update={**free, "efficiency": perfect}))
    # attention computes half of s x s, 3.5 times instead of 3
    config = run_of("7b")
    tokens = 64 * 4096
    attention = 12 * 32 * 4096 * 4096 * tokens
    products = flops_per_token(config.model) * tokens - attention
    assert found.seconds == pytest.approx((products + attention * 3.5 / 6) / (8 * 989e12))


def test_recomputation_costs_a_third_more_products_and_the_bubble_what_1f1b_waits() -> None:
    plain = speed(run_of("7b"), 8, H100).parts["matrix products"]
    again = speed(run_of("7b", model={"activation_checkpointing": "full"}), 8, H100).parts["matrix products"]
    head = 3 * 2 * 4096 * 32000 * 64 * 4096 / 8 / (989e12 * H100.efficiency.gemm)
    assert again - head == pytest.approx((plain - head) * 4 / 3)
    piped = speed(run_of("7b", parallel={"pipeline": 4}), 8, H100)
    assert piped.bubble == pytest.approx(3 / (32 + 3))
    busy = sum(
        seconds for name, seconds in piped.parts.items() if name not in ("pipeline bubble", "DP traffic", "optimizer")
    )
    assert piped.parts["pipeline bubble"] == pytest.approx(busy * 3 / 32)


def test_replicas_share_the_adapters_of_a_node() -> None:
    reached = H100.efficiency.links
    assert data_link(run_of(), 8, H100) == 450e9 * reached
    assert data_link(run_of(), 64, H100) == 400e9 * reached  # eight in a node, with an adapter each
    assert data_link(run_of(parallel={"tensor": 8}), 64, H100) == 50e9 * reached


def test_checkpoints_hold_masters_and_moments() -> None:
    config = run_of("1b")
    total = make_plan(config, 8, H100).parameters
    assert checkpoint_bytes(config) == 12 * total
    matrices = 24 * 12 * 2048**2
    assert checkpoint_bytes(run_of("1b", optimizer={"name": "muon"})) == 12 * total - 4 * matrices


def test_no_interval_loses_less_than_the_best() -> None:
    slow = H100.model_copy(update={"link_to_host": 1e8})  # so that a save costs something
    step = 2.0
    config = run_of("7b")
    best = durability(config, 512, slow, step)

    def lost(every: int) -> float:
        changed = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"every": every})})
        return durability(changed, 512, slow, step).overhead

    tried = {every: lost(every) for every in range(1, 4000, 7)}
    assert best.best_every == pytest.approx(min(tried, key=tried.__getitem__), rel=0.05)
    assert best.failure_seconds == pytest.approx(6300 * 3600 / 64)
    assert best.write_seconds == pytest.approx(best.checkpoint_bytes / 64 / 2e9)


def test_saves_that_come_faster_than_the_disk_hold_training_up() -> None:
    """Each waits for the one before, so that a step of 1 s, saved every time, is one save to the next."""
    config = run_of("7b", checkpoint={"every": 1})
    slow = H100.model_copy(update={"disk_write": 1e8})
    found = durability(config, 512, slow, 1.0)
    assert found.write_seconds > 10
    assert found.overhead == pytest.approx(found.stall_seconds + found.write_seconds - 1.0, rel=0.01)


def test_what_does_not_fit_is_mended_by_what_is_proposed() -> None:
    config = run_of("13b")
    found = make_plan(config, 8, H100)
    assert not found.fits and found.remedies
    for one in found.remedies:
        again = make_plan(one.config, 8, H100)
        assert again.fits and again.stages[again.fullest].total == one.memory
        assert not conflicts(one.config, 8)
    assert remedies(run_of("30b", model={"vocab_size": 32000}), 1, H100) == []


def test_search_ranks_layouts_that_fit_and_says_why_others_do_not() -> None:
    config = run_of("13b")
    fitting, reasons = search(config, 8, H100)
    rates = [one.speed.tokens_per_second for one in fitting if one.speed]
    assert len(rates) == len(fitting) > 3 and rates == sorted(rates, reverse=True)
    for one in fitting:
        assert one.memory <= H100.usable and not conflicts(one.config, 8)
        assert one.config.parallel.tensor * one.config.parallel.pipeline <= 8
    found = {(one.config.parallel.tensor, one.config.parallel.pipeline) for one in fitting}
    refused = {tuple(map(int, re.findall(r"\d+", line)[:2])) for line in reasons}
    assert not found & refused
    assert found | refused == {(t, p) for t in (1, 2, 4, 8) for p in (1, 2, 4, 8) if t * p <= 8}
    odd = run_of("13b", model={"heads": 5, "hidden": 5120})
    assert any("GB or more per GPU" in line for line in search(run_of("30b"), 8, MACHINES["a100"])[1])
    assert any("model.heads 5 is not divisible by parallel.tensor 2" in line for line in search(odd, 8, H100)[1])


def test_machine_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("base: h200\nprice_per_gpu_hour: 2.5\nefficiency: {gemm: 0.7}\n")
    found = machine(str(path))
    assert (found.name, found.memory, found.price_per_gpu_hour) == ("cluster", 141e9, 2.5)
    assert found.efficiency == MACHINES["h200"].efficiency.model_copy(update={"gemm": 0.7})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: h300", "base h300 is none of a100, h100, h200, b200"),
        ("base: h100\nspeed: 3", "speed: extra inputs are not permitted"),
        ("memory: 80e9", "peak_flops: field required"),
        ("base: h100\nmemory: -1", "memory: input should be greater than 0"),
        ("- 1", "holds no machine"),
        ("a: [", "not valid YAML"),
    ],
)
def test_wrong_machine_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        machine(str(path))
    with pytest.raises(ConfigError, match="neither one of a100, h100, h200, b200 nor a file"):
        machine("h300")


def test_a_busier_host_bounds_a_small_model() -> None:
    config = run_of("10m", model={"sequence_length": 128})
    assert speed(config, 8, H100.model_copy(update={"launch_seconds": 1e-4})).bound_by_host
    assert not speed(config, 8, H100.model_copy(update={"launch_seconds": 0.0})).bound_by_host
