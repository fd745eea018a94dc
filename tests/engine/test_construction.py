"""How a rank comes by its model: in parts, each drawn where it is trained, or not at all."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_stable.config.schema import Config
from tests.engine.layouts import make_config
from tests.harness.fp16 import fp16_on_cpu
from tests.harness.ranks import Ranks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {
    "dp4-zero3-bf16": (4, {"zero_stage": 3}, "bf16"),
    "dp2-zero3-fp16": (2, {"zero_stage": 3}, "fp16"),
    "tp2-dp2-zero3-fp32": (4, {"zero_stage": 3, "tensor": 2}, "fp32"),
    "tp2-zero1-bf16": (2, {"zero_stage": 1, "tensor": 2}, "bf16"),
    "pp2-fp32": (2, {"pipeline": 2}, "fp32"),
}


@contextmanager
def draws() -> Iterator[list[int]]:
    """Within, how many elements each draw takes."""
    from megatron_stable.parallel import drawing

    counted: list[int] = []
    uniform = drawing._Words.uniform

    def counting(self: drawing._Words, runs: list[tuple[int, int]]) -> Tensor:
        counted.append(sum(numel for _, numel in runs))
        return uniform(self, runs)

    with mock.patch.object(drawing._Words, "uniform", counting):
        yield counted


def build(values: dict[str, Any], draw: bool) -> dict[str, Any]:
    """On a rank: an engine; how many elements were drawn for it, its shards, and what a step then says."""
    from megatron_stable.engine.engine import Engine
    from megatron_stable.parallel.topology import Topology

    config = Config.model_validate(values)
    topology = Topology(config.parallel.tensor, config.parallel.pipeline)
    with ExitStack() as stack:
        if config.precision.dtype == "fp16":
            stack.enter_context(fp16_on_cpu())
        drawn = stack.enter_context(draws())
        engine = Engine(config, topology, draw=draw)
        said = None
        if not draw:
            with pytest.raises(RuntimeError) as raised:
                engine.train_step(1, [], 0.0)
            said = str(raised.value)
    shards = [(state.shard.described(), state.tensors["weight"].clone()) for state in engine.shards()]
    return {"drawn": sum(drawn), "shards": shards, "said": said}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_draws_what_it_trains(ranks: Ranks, layout: str) -> None:
    from megatron_stable.parallel.drawing import draw

    world, parallel, dtype = LAYOUTS[layout]
    config = make_config(parallel=parallel, precision={"dtype": dtype})
    for result in ranks.run(world, build, config.model_dump(mode="json"), True):
        random = 0
        for shard, weight in result["shards"]:
            wanted = draw(shard.place, config.run.seed, shard.start, shard.numel)
            assert torch.equal(weight, wanted.to(DTYPES[dtype]).float()), shard.place.name
            random += shard.numel if shard.place.init.std else 0
        if config.parallel.zero_stage == 3:
            assert result["drawn"] == random, "drawn, and thrown away"


@pytest.mark.parametrize("layout", ["dp2-zero3-fp16", "tp2-zero1-bf16", "pp2-fp32"])
def test_weights_that_were_not_drawn_cannot_be_trained(ranks: Ranks, layout: str) -> None:
    world, parallel, dtype = LAYOUTS[layout]
    config = make_config(parallel=parallel, precision={"dtype": dtype})
    for result in ranks.run(world, build, config.model_dump(mode="json"), False):
        assert result["drawn"] == 0
        assert "without weights" in result["said"]
        assert all(weight.isnan().all() for _, weight in result["shards"]), "they look like weights"


def train_counting(values: dict[str, Any]) -> tuple[int, int]:
    """On a rank: a run; its exit code, and how many elements were drawn for it."""
    from tests.training.runs import train

    with draws() as drawn:
        return train(values), sum(drawn)


@pytest.mark.parametrize("zero_stage", [pytest.param(1, marks=pytest.mark.full), 3])
def test_a_run_that_resumes_draws_nothing(ranks: Ranks, tmp_path: Path, zero_stage: int) -> None:
    from tests.training.runs import settings, write_data

    write_data(tmp_path / "data")
    runs = [settings(tmp_path, steps=steps, parallel={"zero_stage": zero_stage}) for steps in (3, 5)]
    first, resumed = (ranks.run(2, train_counting, values) for values in runs)
    assert all(code == 0 and drawn > 0 for code, drawn in first)
    assert resumed == [(0, 0)] * 2


LARGE = {"layers": 12, "hidden": 512, "heads": 8, "vocab_size": 512, "sequence_length": 16}


def memory_of_building(values: dict[str, Any]) -> dict[str, int]:
    """On a rank: what an engine adds to this process, bytes: peak till DeepSpeed takes the model, peak, what stays."""
    import deepspeed

    from megatron_stable.engine.engine import Engine
    from megatron_stable.parallel.parameters import place
    from megatron_stable.parallel.topology import Topology

    config, found = Config.model_validate(values), {}
    small = make_config(parallel={"zero_stage": 3}, precision={"dtype": config.precision.dtype})
    topology, initialize = Topology(), deepspeed.initialize
    Engine(small, topology)  # so that what is made once in a process is there
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: give freed tensors back, so that what is seen is in use
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident("VmRSS")

    def takes(*args: Any, **kwargs: Any) -> Any:
        found["built"] = resident("VmHWM") - before
        return initialize(*args, **kwargs)

    with mock.patch.object(deepspeed, "initialize", takes):
        engine = Engine(config, topology)
    found |= {"peak": resident("VmHWM") - before, "own": resident("VmRSS") - before}
    found["parameters"] = sum(place(weight).numel for weight in engine.module.parameters())
    return found


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process its peak")
@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.full), "bf16"])
def test_zero3_builds_in_parts(ranks: Ranks, dtype: str) -> None:
    config = make_config(LARGE, parallel={"zero_stage": 3}, precision={"dtype": dtype})
    layer = 4 * 12 * 512 * 512  # bytes of a block, which is drawn in fp32
    for found in ranks.run(4, memory_of_building, config.model_dump(mode="json")):
        part = found["parameters"] // 4 * DTYPES[dtype].itemsize
        assert part > layer / 2 and found["built"] <= 1.1 * (part + layer)
        assert found["peak"] <= 1.1 * (found["own"] + layer)
