"""What the guard costs: training steps with and without it, in turn, on one engine.

    python benchmarks/guard.py                                       # this machine, one rank
    python benchmarks/guard.py --size 830m --dtype bf16 --micro 4    # on a GPU

With the guard, a step looks at all gradients, reduces loss and norm over the ranks, reads them, and judges them. Both
kinds of step end with the metrics of a logged step, which the guard's reduction then is; `--unlogged` leaves them out.
Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from step import batches, in_turn, make_config, options

from megatron_stable.config.schema import GuardConfig
from megatron_stable.engine.engine import Engine
from megatron_stable.engine.outcome import StepMetrics
from megatron_stable.parallel.topology import Topology
from megatron_stable.parallel.world import join_world
from megatron_stable.stability.guard import Guard, Judgement


class Steps:
    """Training steps on random data, whose losses the guard has seen enough of to judge."""

    def __init__(self, args: argparse.Namespace) -> None:
        config = make_config(args)
        self.engine, self.batches, self.logged = Engine(config, Topology()), batches(config), not args.unlogged
        self.guard, self.step = Guard(GuardConfig()), 0
        for value in np.random.default_rng(0).normal(size=500):
            self.step += 1
            self.guard.judge(self.step, 7.6 + 0.01 * value, 0.5 + 0.01 * value)

    def judge(self, metrics: StepMetrics) -> Judgement:
        return self.guard.judge(self.step, metrics.loss, metrics.grad_norm, metrics.skipped)

    def timed(self, guarded: bool) -> float:
        """Seconds of one step."""
        self.step += 1
        began = time.perf_counter()
        outcome = self.engine.train_step(self.step, self.batches, 1e-5, self.judge if guarded else None)
        if self.logged:
            assert outcome.metrics
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began


def judging(count: int = 20000) -> float:
    """Seconds of one judgement."""
    guard = Guard(GuardConfig())
    values = np.random.default_rng(0).normal(size=count).tolist()
    began = time.perf_counter()
    for step, value in enumerate(values, 1):
        guard.judge(step, 3 + 0.01 * value, 0.5 + 0.01 * value)
    return (time.perf_counter() - began) / count


def main() -> None:
    parser = options(__doc__, steps=60)
    parser.add_argument("--unlogged", action="store_true", help="no metrics without the guard: logging.every > 1")
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores, 1 thread"
    print(f"{device}; torch {torch.__version__}, Python {platform.python_version()}; {vars(args)}")
    join_world()
    steps = Steps(args)
    for _ in range(args.warmup):
        steps.timed(True)
        steps.timed(False)
    pairs = in_turn(steps.timed, args.steps)
    ratios = sorted(on / off for on, off in pairs)
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    print(f"step without the guard  {statistics.median(off for _, off in pairs) * 1e3:9.2f} ms")
    print(f"step with the guard     {statistics.median(on for on, _ in pairs) * 1e3:9.2f} ms")
    print(f"ratio, pair by pair: median {statistics.median(ratios):.4f}, 10%..90% {low:.3f}..{high:.3f}")
    print(f"of which judging        {judging() * 1e6:9.1f} us")


if __name__ == "__main__":
    main()
