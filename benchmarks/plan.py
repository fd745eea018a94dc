"""Predicted model FLOPs utilisation beside what other trainers have published, as docs/plan.md has it.

python benchmarks/plan.py

Shapes are those of the published configurations, to our knowledge; micro batches, where a source does not say, are of
16,384 tokens. These are other programs (FSDP, other kernels, compiled or not): the comparison tells whether the model
of speed is of the right size, not how fast megatron-stable is, which nobody has measured.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from megatron_stable.analysis.machines import MACHINES
from megatron_stable.analysis.memory import memory
from megatron_stable.analysis.speed import speed
from megatron_stable.config.schema import Config

MPT = {"vocab_size": 50368, "positions": "learned", "tied_embeddings": True}
FOUNDRY = "llm-foundry, scripts/train/benchmarking/README.md"
SHAPES: dict[str, dict[str, Any]] = {
    "760m": {"layers": 24, "hidden": 1536, "heads": 12, **MPT},
    "1b": {"layers": 24, "hidden": 2048, "heads": 16, **MPT},
    "3b": {"layers": 32, "hidden": 2560, "heads": 20, **MPT},
    "7b": {"layers": 32, "hidden": 4096, "heads": 32, **MPT},
    "8b": {
        "layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn_hidden": 14336, "vocab_size": 128256,
        "activation": "swiglu", "norm": "rmsnorm",
    },
}  # fmt: skip


class Row(NamedTuple):
    """A published figure: MFU by PaLM's convention, or tokens per second and GPU."""

    source: str
    shape: str
    length: int
    mfu: str
    rate: str = ""
    machine: str = "h100"
    zero_stage: int = 1
    micro_size: int = 0
    model: dict[str, Any] = {}  # noqa: RUF012


ROWS = [
    Row(FOUNDRY, "760m", 512, "40.4"),
    Row(FOUNDRY, "760m", 2048, "34.9", "63,147"),
    Row(FOUNDRY, "760m", 4096, "35.8", "55,500"),
    Row(FOUNDRY, "1b", 2048, "41.8"),
    Row(FOUNDRY, "1b", 4096, "40.3"),
    Row(FOUNDRY, "1b", 8192, "37.7"),
    Row(FOUNDRY, "3b", 4096, "42.3", zero_stage=3),
    Row(FOUNDRY, "7b", 2048, "46.4", zero_stage=3),
    Row(FOUNDRY, "7b", 4096, "40.4", zero_stage=3, model={"activation_checkpointing": "full"}),
    Row(FOUNDRY, "760m", 4096, "56.1", machine="a100"),
    Row("torchtitan, benchmarks/, eager", "8b", 8192, "", "5,762", zero_stage=3, micro_size=1),
    Row(
        "torchtitan, benchmarks/, compiled",
        "8b",
        8192,
        "",
        "6,667",
        zero_stage=3,
        micro_size=1,
        model={"compile": True},
    ),
]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(
        "| source | model | GPUs | sequence | MFU published | predicted "
        "| tokens/s and GPU published | predicted | limited by |"
    )
    print("|" + 9 * "---|")
    for row in ROWS:
        on = MACHINES[row.machine]
        micro = row.micro_size or max(1, 16384 // row.length)
        config = Config.model_validate(
            {
                "model": {
                    "size": None,
                    "sequence_length": row.length,
                    "compile": False,
                    **SHAPES[row.shape],
                    **row.model,
                },
                "parallel": {"zero_stage": row.zero_stage},
                "precision": {"dtype": "bf16"},
                "batch": {"global_size": 8 * 8 * micro, "micro_size": micro},
            }
        )
        found = speed(config, 8, on)
        needed = max(stage.total for stage in memory(config, 8, on.device, on.reserve))
        fits = "" if needed <= on.usable else " (does not fit)"
        print(
            f"| {row.source} | {row.shape}{', recomputed' if row.model.get('activation_checkpointing') else ''} "
            f"| 8 x {row.machine} | {row.length} | {row.mfu and row.mfu + '%'} | {found.mfu:.1%}{fits} | {row.rate} "
            f"| {found.tokens_per_second / 8:,.0f} | {found.limit} |"
        )


if __name__ == "__main__":
    main()
