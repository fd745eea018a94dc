"""The time of a step on GPUs, predicted before anybody has measured it: from counts, at the rates that `plan` assumes.

    python benchmarks/prediction.py

Twice: as `megatron-stable plan` says, which halves an estimate of element-wise traffic where blocks are compiled; and
with the bytes that Inductor's scheduler counts (`benchmarks/block_counts.py`). The models on one GPU are those of
`benchmarks/gpu.py`, which prints what came.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from block_counts import BESIDE, Case, compiled, counted

from megatron_stable.analysis.machines import MACHINES, Machine
from megatron_stable.analysis.speed import Speed, speed
from megatron_stable.config.schema import Config
from megatron_stable.training.flops import flops_per_token

DEEP = {"size": None, "layers": 30, "hidden": 1408, "heads": 11, "recipe": "qk_norm"}  # 830m of benchmarks/gpu.py
LARGE = {"size": "10b", "recipe": "qk_norm", "norm": "rmsnorm", "activation": "swiglu"}


class Row(NamedTuple):
    """What is predicted: a model on ``world`` GPUs, ``micro`` sequences at a time, so many of them a step."""

    name: str
    machine: str
    model: dict[str, Any]
    world: int
    parallel: dict[str, Any]
    micro: int
    accumulation: int

    def config(self) -> Config:
        replicas = self.world // (self.parallel.get("tensor", 1) * self.parallel.get("pipeline", 1))
        return Config.model_validate(
            {
                "model": {"sequence_length": 4096, "vocab_size": 64000, "compile": True, **self.model},
                "precision": {"dtype": "bf16"},
                "parallel": self.parallel,
                "batch": {"global_size": self.micro * self.accumulation * replicas, "micro_size": self.micro},
                "loss": {"z_loss": 1e-4},
            }
        )


WIDE = {"tensor": 4, "pipeline": 2, "sequence": True}  # examples/10b.yaml
ROWS = [
    Row("830m", "h100", DEEP, 1, {}, 4, 1),
    Row("830m", "h200", DEEP, 1, {}, 4, 1),
    Row("830m, 8 micro batches", "h100", DEEP, 1, {}, 4, 8),
    Row("10b, TP 8", "h100", LARGE, 8, {"tensor": 8, "sequence": True}, 4, 64),
    Row("10b, TP 4 x PP 2 x DP 8", "h100", LARGE, 64, WIDE, 1, 128),
]


def with_counts(row: Row, planned: Speed, on: Machine) -> float:
    """Seconds of a step with the element-wise traffic of the busiest stage as the scheduler counts it."""
    config = row.config()
    model = config.model.model_dump(exclude={"attention", "compile"})
    work = counted(Case(row.name, model, row.micro, config.parallel.tensor), compiled)
    blocks = -(-config.model.layers // config.parallel.pipeline) * row.accumulation
    element_wise = work.of(*BESIDE)[1] * blocks / on.memory_bandwidth / on.efficiency.memory
    saved = planned.parts["element-wise"] - element_wise
    # a micro batch of each other stage is the bubble
    return planned.seconds - saved * (1 + (config.parallel.pipeline - 1) / row.accumulation)


def main() -> None:
    print("| model | GPUs | ms per step, by plan | by counts | tokens/s and GPU | MFU | causal | the largest parts |")
    print("|---|---|---|---|---|---|---|---|")
    for row in ROWS:
        on, config = MACHINES[row.machine], row.config()
        planned = speed(config, row.world, on)
        seconds = with_counts(row, planned, on)
        tokens = config.batch.global_size * config.model.sequence_length
        rates = sorted(tokens / each / row.world for each in (planned.seconds, seconds))
        scale = flops_per_token(config.model) / on.peak_flops["bf16"]
        mfu, causal = (
            [share * each for each in (rates[0] * scale, rates[1] * scale)]
            for share in (1, planned.mfu_causal / planned.mfu)
        )
        parts = ", ".join(f"{name} {value / planned.seconds:.0%}" for name, value in list(planned.parts.items())[:4])
        print(
            f"| {row.name} | {row.world} {row.machine} | {planned.seconds * 1e3:,.0f} | {seconds * 1e3:,.0f} "
            f"| {rates[0]:,.0f}-{rates[1]:,.0f} | {mfu[0]:.0%}-{mfu[1]:.0%} | {causal[0]:.0%}-{causal[1]:.0%} "
            f"| {parts} |"
        )


if __name__ == "__main__":
    main()
