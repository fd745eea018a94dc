"""The spike detector on curves of real, small training runs.

    python benchmarks/curves.py              # what it and three other rules say of the recorded curves
    python benchmarks/curves.py --record     # train again, and write benchmarks/curves.json (a quarter of an hour)

The runs are those of examples/instability.py: 4 layers of width 128 on the bytes of Python's standard library. Some are
healthy, some fail by themselves, and in three the data is bad on purpose: random bytes for 4 steps and for 60 steps,
and a mix of which a third is text read backwards from a step on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import numpy as np
import torch
from detector import events
from instability import BATCH, SEQUENCE, batch, make_config, text
from rules import ours, ours_norm, six_sigma, zclip
from torch import Tensor

from megatron_stable.engine.engine import Engine
from megatron_stable.parallel.topology import Topology
from megatron_stable.parallel.world import join_world
from megatron_stable.stability.detector import GRAD_NORM, LOSS, Spike, find_spikes

FILE = Path(__file__).with_name("curves.json")
BAD = 400  # the step at which data goes bad


class Case(NamedTuple):
    """A run: what it is like, and how the data goes bad, if it does."""

    recipe: str
    learning_rate: float
    steps: int = 600
    bad: str = ""  # "random 4": for 4 steps; "backwards": a third of the samples, to the end

    @property
    def name(self) -> str:
        return f"{self.recipe} {self.learning_rate:g} {self.bad}".strip()


CASES = [
    Case("qk_norm", 3e-3, 1000),
    Case("baseline", 3e-3, 1000),
    Case("qk_norm_cap", 0.05),
    Case("baseline", 0.03),
    Case("baseline", 0.1),
    Case("qk_norm", 0.1),
    Case("qk_norm", 3e-3, bad="random 4"),
    Case("qk_norm", 3e-3, bad="random 60"),
    Case("qk_norm", 3e-3, bad="backwards"),
]


def spoiled(tokens: Tensor, bad: str, step: int) -> Tensor:
    """The batch of a step, with what is bad about it."""
    kind, _, length = bad.partition(" ")
    if kind == "random" and BAD <= step < BAD + int(length):
        return torch.randint(256, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(step))
    if kind == "backwards" and step >= BAD:
        third = BATCH // 3
        return torch.cat([tokens[:third].flip(1), tokens[third:]])
    return tokens


def record(case: Case, data: Tensor) -> dict[str, list[float]]:
    """Train, and keep loss and gradient norm of each step."""
    config = make_config(case.recipe, case.learning_rate, case.steps, seed=1)
    config = config.model_copy(update={"precision": config.precision.model_copy(update={"dtype": "bf16"})})
    engine, losses, norms = Engine(config, Topology()), [], []
    for step in range(1, case.steps + 1):
        rate = case.learning_rate * min(1.0, step / config.schedule.warmup_steps)
        metrics = engine.train_step(step, [spoiled(batch(data, step), case.bad, step)], rate).metrics
        losses.append(float(f"{metrics.loss:.5g}"))
        norms.append(float(f"{metrics.grad_norm:.5g}"))
    return {"loss": losses, "grad_norm": norms}


def told(found: list[Spike]) -> str:
    """Excursions in short."""
    return ", ".join(f"{spike.kind} {spike.onset}+{spike.duration}" for spike in found) or "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    if args.record:
        join_world()
        data, curves = text(), {}
        for case in CASES:
            curves[case.name] = record(case, data)
            print(f"{case.name}: {curves[case.name]['loss'][-1]:.3f}", flush=True)
            FILE.write_text(json.dumps(curves, separators=(",", ":")) + "\n")
    curves = json.loads(FILE.read_text())
    print("onset + duration of what is found; alarms (runs of them) of the other rules on the loss\n")
    print(f"{'run':30} {'loss':44} {'gradient norm':44} {'ours':>5} {'norm':>5} {'6sigma':>7} {'zclip':>6}")
    for name, curve in curves.items():
        steps = range(1, len(curve["loss"]) + 1)
        loss, norm = (find_spikes(steps, curve[key], how) for key, how in (("loss", LOSS), ("grad_norm", GRAD_NORM)))
        counts = [events(rule(np.array(curve["loss"]))) for rule in (ours, six_sigma)]
        norms = [events(rule(np.array(curve["grad_norm"]))) for rule in (ours_norm, zclip)]
        print(f"{name:30} {told(loss):44} {told(norm):44} {counts[0]:5} {norms[0]:5} {counts[1]:7} {norms[1]:6}")


if __name__ == "__main__":
    main()
