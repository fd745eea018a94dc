"""What it costs to keep documents apart and to look for repetitions: step time as a ratio to that without.

    python benchmarks/documents.py                          # this machine: a CPU, or a GPU with torch.compile
    python benchmarks/documents.py --length 200 --steps 40  # documents of 200 tokens, in the mean

Engines of the same model without and with the mask take turns in one process, so that the ratio holds when the
machine's speed drifts; a second engine without it shows what the ratio is when nothing differs. Where a rule of the
data is no part of the step, its time is that per sample of 4096 tokens. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from megatron_stable.config.schema import Config
from megatron_stable.data import RepetitionFilter
from megatron_stable.engine.engine import Engine
from megatron_stable.model.backends import choose_backend
from megatron_stable.parallel.topology import Topology
from megatron_stable.parallel.world import join_world

GPU: dict[str, Any] = {"size": "302m", "dtype": "bf16", "micro": 8, "compile": True}
CPU: dict[str, Any] = {"size": "tiny", "dtype": "fp32", "micro": 4, "compile": False}
VOCABULARY, END = 2048, 0
MASK = {"document_mask": True, "end_of_document": END}
CASES: dict[str, dict[str, Any]] = {
    "no mask, again": {},
    "document_mask": MASK,
    "repetition_filter": {"repetition_filter": 32},
}


def make_config(args: argparse.Namespace, data: dict[str, Any]) -> Config:
    """The configuration that is measured."""
    return Config.model_validate(
        {
            "model": {
                "size": args.size, "recipe": args.recipe, "vocab_size": VOCABULARY, "compile": args.compile,
                "sequence_length": args.sequence,
            },
            "data": data,
            "precision": {"dtype": args.dtype},
            "batch": {"global_size": args.micro, "micro_size": args.micro},
        }
    )  # fmt: skip


class Runner:
    """An engine that trains on one batch over and over."""

    def __init__(self, config: Config, length: int) -> None:
        self.engine, self.step = Engine(config, Topology()), 0
        generator = torch.Generator().manual_seed(0)
        shape = (config.batch.micro_size, config.model.sequence_length + 1)
        tokens = torch.randint(1, VOCABULARY, shape, generator=generator)
        tokens[torch.rand(shape, generator=generator) < 1 / length] = END
        self.batch = [tokens]

    def timed(self) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        self.step += 1
        self.engine.train_step(self.step, self.batch, 1e-4)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began


def look_through(samples: int = 50) -> float:
    """Seconds to look for repetitions in a sample of 4096 tokens."""
    drawn = np.random.default_rng(0).integers(0, 32000, (samples, 4097))
    rule = RepetitionFilter(32)
    began = time.perf_counter()
    for tokens in drawn:
        rule.finds(tokens)
    return (time.perf_counter() - began) / samples


def main() -> None:
    on_gpu = torch.cuda.is_available()
    usual = GPU if on_gpu else CPU
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default=usual["size"])
    parser.add_argument("--recipe", default="qk_norm")
    parser.add_argument("--dtype", default=usual["dtype"])
    parser.add_argument("--micro", type=int, default=usual["micro"])
    parser.add_argument("--sequence", type=int, default=1024 if on_gpu else 256)
    parser.add_argument("--length", type=int, default=100, help="of documents, in the mean")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=usual["compile"])
    args = parser.parse_args()
    join_world(600)
    baseline = Runner(make_config(args, {}), args.length)
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {os.cpu_count()} cores, 1 thread"
    print(f"{device}; torch {torch.__version__}, Python {platform.python_version()}; {vars(args)}\n")
    print(f"{'':18} {'attention':>9} {'ms/step':>9} {'ratio':>7} {'10%..90%':>14}")
    for name, data in CASES.items():
        config = make_config(args, data)
        runner = Runner(config, args.length)
        for each in (baseline, runner) * 3:
            each.timed()
        pairs = [(baseline.timed(), runner.timed()) for _ in range(args.steps)]
        ratios = sorted(own / other for other, own in pairs)
        spread = f"{ratios[len(ratios) // 10]:.3f}..{ratios[-1 - len(ratios) // 10]:.3f}"
        chosen = choose_backend(config.model, "cuda" if on_gpu else "cpu", config.data.document_mask).name
        seconds = statistics.median(own for _, own in pairs)
        print(f"{name:18} {chosen:>9} {seconds * 1e3:9.1f} {statistics.median(ratios):7.3f} {spread:>14}", flush=True)
        runner.engine.close()
    print(f"\nlooking for repetitions: {look_through() * 1e6:.0f} µs per sample of 4096 tokens")


if __name__ == "__main__":
    main()
