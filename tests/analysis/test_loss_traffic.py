"""What the loss moves: the plan's constants beside operators counted one by one; a GPU's passes by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_stable.analysis.machines import MACHINES
from megatron_stable.analysis.speed import CAP_TRAFFIC, LOSS_TRAFFIC, speed
from tests.analysis.test_plan import run_of


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    file = Path(__file__).parents[2] / "benchmarks" / "cross_entropy.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_cross_entropy", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("cap", "planned"), [(None, LOSS_TRAFFIC), (30.0, LOSS_TRAFFIC + CAP_TRAFFIC)])
def test_pytorch_moves_what_is_planned(benchmark: ModuleType, cap: float | None, planned: int) -> None:
    moved, held = benchmark.counted(1024, 2**16, cap)
    assert moved == pytest.approx(planned, rel=1e-3)
    chunk = 4 * 2**24
    # the gradient, and of a chunk in fp32 two copies, under a cap four
    assert held == pytest.approx(2 * 1024 * 2**16 + (2 if cap is None else 4) * chunk, rel=2e-3)


def test_the_count_is_right_where_it_is_known(benchmark: ModuleType) -> None:
    x = torch.empty(1000, dtype=torch.float32)
    with benchmark.Traffic() as traffic:
        y = x.view(10, 100).exp()  # a view moves nothing; reads 4000, writes 4000
        y.mul_(2)  # reads and writes in place
        z = torch.empty_like(y).copy_(y)  # writes without reading
        del y
        z.gather(
            1, torch.zeros(10, 1, dtype=torch.int64)
        )  # writes 10 indices; takes 10 numbers, counted as wide as these
    assert traffic.moved == 3 * 8000 + 10 * 8 + 3 * 10 * 8
    assert traffic.most == 8000


def test_a_gpu_passes_over_the_logits_three_times() -> None:
    h100 = MACHINES["h100"]
    moved = 3 * 2 * 32000 * 64 * 4096 / 8  # bf16; a rank's share of the batch
    for cap in (None, 30.0):
        found = speed(run_of("1b", model={"final_logit_cap": cap}), 8, h100)
        assert found.parts["loss"] == pytest.approx(moved / (h100.memory_bandwidth * h100.efficiency.memory))
