"""What each recipe and rule costs: step time as a ratio to the baseline's in the same run, and peak memory.

    python benchmarks/recipes.py                        # this machine: a CPU, or a GPU with torch.compile
    python benchmarks/recipes.py --recipes baseline qk_norm qk_clip --steps 40

For each recipe, an engine of the baseline and one of the recipe take turns in a process of their own, so that the
ratio holds when the machine's speed drifts. The table has the median of the ratios, pair by pair, and their 10% to 90%
range. Memory is the peak of a process that trains that recipe alone: allocated by PyTorch on a GPU, resident on a CPU
(to which Python and PyTorch add half a gigabyte). Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from megatron_stable.config.recipes import RECIPES
from megatron_stable.config.schema import Config
from megatron_stable.engine.engine import Engine
from megatron_stable.model.backends import choose_backend
from megatron_stable.parallel.topology import Topology
from megatron_stable.parallel.world import join_world

GPU: dict[str, Any] = {"size": "302m", "dtype": "bf16", "micro": 8, "vocabulary": 32000, "compile": True}
CPU: dict[str, Any] = {"size": "tiny", "dtype": "fp32", "micro": 4, "vocabulary": 2048, "compile": False}
# rules of the optimizer, measured like recipes
RULES: dict[str, dict[str, Any]] = {
    "qk_clip": {"qk_clip": 100.0},
    "stable_adamw": {"name": "stable_adamw"},
    "adagc": {"clipping": "adagc"},
    "muon": {"name": "muon"},
}


def make_config(args: argparse.Namespace, recipe: str) -> Config:
    """The configuration that is measured."""
    model = {"size": args.size, "compile": args.compile, "vocab_size": args.vocabulary}
    return Config.model_validate(
        {
            "model": model if recipe in RULES else {**model, "recipe": recipe},
            "optimizer": RULES.get(recipe, {}),
            "precision": {"dtype": args.dtype},
            "batch": {"global_size": args.micro, "micro_size": args.micro},
            "loss": {"z_loss": 1e-4},
        }
    )


class Runner:
    """An engine that trains on one batch over and over."""

    def __init__(self, config: Config) -> None:
        self.engine, self.step = Engine(config, Topology()), 0
        shape = (config.batch.micro_size, config.model.sequence_length + 1)
        assert config.model.vocab_size is not None
        generator = torch.Generator().manual_seed(0)
        self.batch: list[Tensor] = [torch.randint(config.model.vocab_size, shape, generator=generator)]

    def timed(self) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        self.step += 1
        self.engine.train_step(self.step, self.batch, 1e-4)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the recipe's step, and ratios to the baseline's."""
    ours, base = Runner(make_config(args, args.recipe)), Runner(make_config(args, "baseline"))
    for runner in (ours, base) * args.warmup:
        runner.timed()
    pairs = []
    for turn in range(args.steps):
        if turn % 2:  # who is first changes: the second may find warm caches
            a = ours.timed()
            b = base.timed()
        else:
            b = base.timed()
            a = ours.timed()
        pairs.append((a, b))
    return {"seconds": statistics.median(a for a, _ in pairs), "ratios": sorted(a / b for a, b in pairs)}


def peak_memory(args: argparse.Namespace) -> dict[str, Any]:
    """GB, of this process."""
    runner = Runner(make_config(args, args.recipe))
    for _ in range(3):
        runner.timed()
    if torch.cuda.is_available():
        return {"memory": torch.cuda.max_memory_allocated() / 1e9}
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"memory": int(status["VmHWM"].split()[0]) * 1024 / 1e9}


def measured(recipe: str, what: str) -> dict[str, Any]:
    """What a process of its own finds."""
    command = [sys.executable, __file__, *sys.argv[1:], "--recipe", recipe, "--what", what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not found:
        raise SystemExit(done.stdout + done.stderr)
    result: dict[str, Any] = json.loads(found[-1])
    return result


def main() -> None:
    on_gpu = torch.cuda.is_available()
    defaults = GPU if on_gpu else CPU
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipes", nargs="+", choices=[*RECIPES, *RULES], default=[*RECIPES, *RULES], metavar="RECIPE"
    )
    parser.add_argument("--size", default=defaults["size"])
    parser.add_argument("--dtype", default=defaults["dtype"])
    parser.add_argument("--micro", type=int, default=defaults["micro"], help="sequences per step")
    parser.add_argument("--vocabulary", type=int, default=defaults["vocabulary"])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=defaults["compile"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--recipe", help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=["time", "memory"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what:
        join_world()
        print(json.dumps(compare(args) if args.what == "time" else peak_memory(args)), flush=True)
        return
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {os.cpu_count()} cores, 1 thread"
    said = {key: value for key, value in vars(args).items() if key not in ("recipes", "recipe", "what")}
    print(f"{device}; torch {torch.__version__}, Python {platform.python_version()}; {said}\n")
    print(f"{'recipe':14} {'attention':>9} {'ms/step':>9} {'ratio':>7} {'10%..90%':>14} {'peak GB':>8}")
    for recipe in args.recipes:
        backend = choose_backend(make_config(args, recipe).model, "cuda" if on_gpu else "cpu").name
        time_, memory = measured(recipe, "time"), measured(recipe, "memory")["memory"]
        seconds, ratios = time_["seconds"], time_["ratios"]
        spread = f"{ratios[len(ratios) // 10]:.3f}..{ratios[-1 - len(ratios) // 10]:.3f}"
        ratio = statistics.median(ratios)
        print(f"{recipe:14} {backend:>9} {seconds * 1e3:9.1f} {ratio:7.3f} {spread:>14} {memory:8.2f}", flush=True)


if __name__ == "__main__":
    main()
