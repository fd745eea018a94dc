"""Counted figures by size and number of ranks, as docs/scale.md has them: by arithmetic, which tests/scale checks.

python benchmarks/scale.py
"""

from __future__ import annotations

import argparse

from megatron_stable.analysis.footprint import footprints
from megatron_stable.config.schema import Config
from megatron_stable.model.transformer import parameter_count

NETWORK = 50e9  # bytes per second and GPU between nodes: 400 Gb/s each
ACHIEVED = 400e12  # floating-point operations per second and GPU: 40 % of an H100's peak
VOCABULARY = {"830m": 256000}
BATCH = {"830m": 512, "10b": 512, "30b": 1024}  # sequences of 4096
LAYOUTS = {  # size: ranks: (TP, PP)
    "830m": {8: (1, 1), 64: (1, 1), 512: (1, 1)},
    "10b": {8: (8, 1), 64: (4, 2), 512: (4, 2), 1024: (8, 2)},
    "30b": {64: (8, 4), 512: (8, 4), 1024: (8, 4)},
}


def config_of(size: str, tensor: int, pipeline: int, stage: int = 1) -> Config:
    """A run of a named size in bf16."""
    model = {"size": size, "vocab_size": VOCABULARY.get(size, 64000), "recipe": "qk_norm", "norm": "rmsnorm"}
    return Config.model_validate(
        {
            "model": model if size == "830m" else {**model, "activation": "swiglu"},
            "parallel": {"tensor": tensor, "pipeline": pipeline, "sequence": tensor > 1, "zero_stage": stage},
            "precision": {"dtype": "bf16"},
            "batch": {"global_size": BATCH[size], "micro_size": 1},
        }
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("Of the fullest stage; GB are 10^9 bytes. Sent: by one rank in one step.\n")
    print("| size | ranks | TP x PP x DP | parameters | weights | gradients | optimizer", end="")
    print(" | sent: DP | TP | PP | DP, of a step |\n|" + 11 * "---|")
    for size, layouts in LAYOUTS.items():
        for ranks, (tensor, pipeline) in layouts.items():
            config = config_of(size, tensor, pipeline)
            found = max(footprints(config, ranks), key=lambda stage: stage.states)
            tokens = config.batch.global_size * config.model.sequence_length
            step = 6 * parameter_count(config.model)[1] * tokens / (ranks * ACHIEVED)
            share = found.dp_bytes / NETWORK / step
            held, sent = (found.weights, found.gradients, found.optimizer), (found.tp_bytes, found.pp_bytes)
            cells = " | ".join(f"{value / 1e9:.2f} GB" for value in (*held, found.dp_bytes, *sent))
            grid = f"{tensor} x {pipeline} x {ranks // tensor // pipeline}"
            print(f"| {size} | {ranks} | {grid} | {found.parameters / 1e6:.0f} M | {cells} | {share:.1%} |")
    print(
        "\nBytes per parameter of a TP and PP slice, on d replicas; sent: per parameter and step, of m micro batches\n"
    )
    print("| | held | sent between replicas |\n|---|---|---|")
    print("| ZeRO-1, bf16 | 6 + 12/d | 6 (1 - 1/d): fp32 gradients scattered, bf16 weights gathered |")
    print("| ZeRO-2, bf16 | 2 + 16/d + buckets of 100 MB | (8 m + 2) (1 - 1/d): all-reduced every micro batch |")
    print("| ZeRO-3, bf16 | 18/d + buckets + what is live | (4 m + 4 m) (1 - 1/d) |")
    print("| DeepSpeed's own ZeRO-1, bf16, fp32 accumulation | 8 + 12/d | 6 (1 - 1/d), its sums in bf16; 10 in fp32 |")
    print("| Megatron-LM, distributed optimizer, fp32 gradients | 6 + 12/d | 6 (1 - 1/d) |")


if __name__ == "__main__":
    main()
