"""What saving costs: the stall of an asynchronous save against a synchronous one, and MB/s against ``torch.save``.

    python benchmarks/checkpoint.py                          # 10m: 3 x 512, here with a vocabulary of 8192
    python benchmarks/checkpoint.py --size 830m --dtype bf16  # on a GPU

Asynchronous saves overlap with training steps, so the steps are run while they write, and what they take longer is
counted as stall too. ``torch.save`` writes the same tensors from host memory, without checksums; it is timed with an
fsync, in turn with ours and in random order, as the speed of a disk drifts. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from megatron_stable.checkpoint.health import Retention
from megatron_stable.checkpoint.saver import Saver
from megatron_stable.checkpoint.state import Layout, RunState
from megatron_stable.config.schema import Config
from megatron_stable.data import Course
from megatron_stable.engine.engine import Engine
from megatron_stable.parallel.topology import Topology
from megatron_stable.parallel.world import join_world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="10m")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="training steps between saves")
    parser.add_argument("--directory", type=Path, help="where to write; default: a temporary directory")
    args = parser.parse_args()
    join_world()
    model = {"size": args.size} | (
        {} if args.size == "830m" else {"vocab_size": args.vocabulary, "sequence_length": 128}
    )
    config = Config.model_validate(
        {"model": model, "precision": {"dtype": args.dtype}, "batch": {"global_size": 1, "micro_size": 1}}
    )
    engine = Engine(config, Topology())
    assert config.model.vocab_size is not None
    tokens = torch.randint(config.model.vocab_size, (1, config.model.sequence_length + 1))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores, 1 thread"
    print(f"{device}; torch {torch.__version__}, Python {platform.python_version()}; size {args.size}, {args.dtype}")
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        measure(args, config, engine, tokens, Path(scratch))


def measure(args: argparse.Namespace, config: Config, engine: Engine, tokens: torch.Tensor, root: Path) -> None:
    """Print the table."""
    count = iter(range(1, 10**9))

    def steps() -> float:
        began = time.perf_counter()
        for _ in range(args.steps):
            outcome = engine.train_step(next(count), [tokens], 1e-4)
        assert outcome.metrics  # waits for the device
        return (time.perf_counter() - began) / args.steps

    steps()
    shards, state = engine.shards(), RunState(**engine.state(), course=Course.begin(1))
    size = sum(t.numel() * t.element_size() for shard in shards for t in shard.tensors.values())
    saver = Saver(root / "checkpoints", Retention(1), report=lambda text: None)
    tensors = {f"{i}:{kind}": t.cpu().clone() for i, s in enumerate(shards) for kind, t in s.tensors.items()}

    def synchronous(turn: int) -> float:
        began = time.perf_counter()
        saver.save(2 * turn + 1, shards, Layout(), config, state)
        saver.wait()
        return time.perf_counter() - began

    def plain(turn: int) -> float:
        began = time.perf_counter()
        with (root / f"plain_{turn}.pt").open("wb") as file:
            torch.save(tensors, file)
            os.fsync(file.fileno())
        (root / f"plain_{turn - 1}.pt").unlink(missing_ok=True)
        return time.perf_counter() - began

    idles, during, stalls, ours, theirs = [], [], [], [], []
    for turn in range(args.saves + 1):
        idle = steps()
        began = time.perf_counter()
        saver.save(2 * turn, shards, Layout(), config, state)
        stall = time.perf_counter() - began
        busy = steps()
        saver.wait()
        # to new files, those before deleted; whoever is second finds memory that the other has freed
        seconds = {way: way(turn) for way in random.sample([synchronous, plain], 2)}
        if turn:  # the first warms up
            idles.append(idle)
            during.append(busy)
            stalls.append(stall)
            ours.append(seconds[synchronous])
            theirs.append(seconds[plain])
    median = statistics.median
    stall, slower = median(stalls), (median(during) - median(idles)) * args.steps
    whole, other = median(ours), median(theirs)
    print(f"{size / 1e6:.1f} MB of tensors; a training step takes {median(idles) * 1e3:.1f} ms")

    def show(what: str, seconds: float, note: str) -> None:
        print(f"{what:40} {seconds * 1e3:9.1f} ms   {note}")

    show("synchronous save", whole, f"{size / 1e6 / whole:.0f} MB/s")
    show("asynchronous save, loop stopped", stall, f"{stall / whole:.3f} x synchronous")
    show(
        f"  and the next {args.steps} steps longer by",
        slower,
        f"{(stall + slower) / whole:.3f} x synchronous with both",
    )
    show("torch.save and fsync", other, f"{size / 1e6 / other:.0f} MB/s, ours {other / whole:.2f} x that")


if __name__ == "__main__":
    main()
