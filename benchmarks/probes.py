"""What the probes cost: steps that are measured and steps that are not, in turn, on one engine, for each group.

    python benchmarks/probes.py                                             # this machine, one rank
    python benchmarks/probes.py --size 830m --dtype bf16 --micro 4 --compile    # on a GPU

A measured step includes what follows it: the numbers brought together, read, and made into a record's line. Its extra
time, pair by pair, over the interval is what an interval costs: 1 + (ratio - 1) / interval. On a CPU it is processor
time, which other programs disturb less. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Collection

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from step import batches, in_turn, make_config, options

from megatron_stable.config.schema import PROBE_GROUPS
from megatron_stable.engine.engine import Engine
from megatron_stable.engine.readings import Readings
from megatron_stable.optim.probes import GROUPS
from megatron_stable.parallel.topology import Topology
from megatron_stable.parallel.world import join_world

INTERVALS = (1, 10, 100)
CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time


class Steps:
    """Training steps on random data."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.config = make_config(args)
        self.engine, self.batches, self.step = Engine(self.config, Topology()), batches(self.config), 0

    def choose(self, groups: Collection[str]) -> None:
        """Measure these groups alone."""
        probes = self.engine.probes
        assert probes is not None
        logging = self.config.logging.model_copy(update={"probes": tuple(groups)})
        probes.readings = Readings(self.config.model_copy(update={"logging": logging}))
        probes.activations.switch.outputs = "outputs" in groups
        probes.activations.switch.attention = "attention" in groups
        probes.activations.of_logits = "logits" in groups
        probes.parameters.rows = {row for group in groups for row in GROUPS.get(group, ())}

    def timed(self, measured: bool) -> float:
        """Seconds of one step."""
        self.step += 1
        began = CLOCK()
        outcome = self.engine.train_step(self.step, self.batches, 1e-5, measured=measured)
        assert outcome.metrics
        if measured and self.engine.probes is not None:
            json.dumps(self.engine.probes.last())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return CLOCK() - began


def main() -> None:
    parser = options(__doc__, steps=40)
    parser.add_argument("--together", action="store_true", help="all groups together alone")
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores, 1 thread"
    print(f"{device}; torch {torch.__version__}, Python {platform.python_version()}; {vars(args)}")
    join_world()
    steps = Steps(args)
    print(f"{'':12}{'10%..90% of pairs':>20}" + "".join(f"{f'every {n}':>12}" for n in INTERVALS))
    each = () if args.together else ((), *((group,) for group in PROBE_GROUPS))
    for groups in (*each, PROBE_GROUPS):
        steps.choose(groups)
        in_turn(steps.timed, args.warmup)
        pairs = in_turn(steps.timed, args.steps)
        ratios = sorted(on / off for on, off in pairs)
        spread = f"{ratios[len(ratios) // 10]:.3f}..{ratios[-1 - len(ratios) // 10]:.3f}"
        cost = statistics.median(ratios) - 1
        name = "no group" if not groups else "all" if groups == PROBE_GROUPS else groups[0]
        print(f"{name:12}{spread:>20}" + "".join(f"{1 + cost / n:12.4f}" for n in INTERVALS), flush=True)
    print(f"step that is not measured, with all: {statistics.median(off for _, off in pairs) * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
