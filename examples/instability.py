"""A learning rate at which the baseline fails and QK-norm trains on, in minutes on a CPU.

    python examples/instability.py                                   # five recipes, about a minute each on one core
    python examples/instability.py --learning-rate 0.1 --recipes baseline qk_norm soft_cap

Trains a model of 4 layers and width 128 on the bytes of Python's own standard library, once per recipe, from the same
initial weights on the same batches; prints a table and writes a figure. Beside the loss it follows the largest
attention logit of any head, before a cap: where it passes 10^3, softmax has become an argmax and its gradient has
vanished.
"""

from __future__ import annotations

import argparse
import math
import os
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from megatron_stable.config.recipes import RECIPES
from megatron_stable.config.schema import Config
from megatron_stable.engine.engine import Engine
from megatron_stable.model.attention import Attention
from megatron_stable.model.largest_logits import max_attention_logits
from megatron_stable.parallel.topology import Topology
from megatron_stable.parallel.world import join_world

SEQUENCE, BATCH, PROBE_EVERY = 128, 16, 5


@dataclass
class Curve:
    """What happened to one recipe."""

    losses: list[float] = field(default_factory=list)
    probed: list[int] = field(default_factory=list)
    logits: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def final(self) -> float:
        """Mean loss of the last tenth of the steps."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last)


def text(most_bytes: int = 4_000_000) -> Tensor:
    """Bytes of the standard library's source, 1-d int64."""
    root, data = Path(sysconfig.get_paths()["stdlib"]), bytearray()
    for path in sorted(root.glob("*.py")):
        data += path.read_bytes()
        if len(data) > most_bytes:
            break
    return torch.frombuffer(data, dtype=torch.uint8).long()


def batch(data: Tensor, step: int) -> Tensor:
    """``[BATCH, SEQUENCE + 1]``, the same for every recipe."""
    starts = torch.randint(len(data) - SEQUENCE, (BATCH,), generator=torch.Generator().manual_seed(step))
    return torch.stack([data[start : start + SEQUENCE + 1] for start in starts.tolist()])


def make_config(recipe: str, learning_rate: float, steps: int, seed: int) -> Config:
    """The run of one recipe."""
    return Config.model_validate(
        {
            "run": {"steps": steps, "seed": seed},
            "model": {
                "size": None, "layers": 4, "hidden": 128, "heads": 4, "sequence_length": SEQUENCE, "vocab_size": 256,
                "recipe": recipe,
            },
            "batch": {"global_size": BATCH, "micro_size": BATCH},
            "optimizer": {"learning_rate": learning_rate},
            "schedule": {"kind": "constant", "warmup_steps": 20},
        }
    )  # fmt: skip


@torch.no_grad()
def largest_logit(engine: Engine, tokens: Tensor) -> float:
    """The largest attention logit of any layer and head on a batch, before a cap."""
    found: list[float] = []

    def probe(attention: Attention, given: tuple[Tensor]) -> None:
        q, k, _ = attention.project(given[0])
        top = max_attention_logits(q.transpose(1, 2), k.transpose(1, 2), attention.scores.scale)
        found.append(float(top.max()))

    modules = [module for module in engine.module.modules() if isinstance(module, Attention)]
    handles = [module.register_forward_pre_hook(probe) for module in modules]
    engine.module(tokens[:4, :-1].to(engine.device))
    for handle in handles:
        handle.remove()
    return max(found)


def train(config: Config, data: Tensor) -> Curve:
    """Train one recipe and watch it."""
    engine, curve, began = Engine(config, Topology()), Curve(), time.perf_counter()
    for step in range(1, config.run.steps + 1):
        tokens = batch(data, step)
        rate = config.optimizer.learning_rate * min(1.0, step / config.schedule.warmup_steps)
        curve.losses.append(engine.train_step(step, [tokens], rate).metrics.loss)
        if step % PROBE_EVERY == 0 or step == config.run.steps:
            curve.probed.append(step)
            curve.logits.append(largest_logit(engine, tokens))
    curve.seconds = time.perf_counter() - began
    return curve


def draw(curves: dict[str, Curve], output: Path, title: str) -> None:
    """Loss and largest logit over steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    for i, (name, curve) in enumerate(curves.items()):
        style: dict[str, Any] = {"color": f"C{i}", "label": name, "linewidth": 1.2}
        top.plot(range(1, len(curve.losses) + 1), curve.losses, **style)
        bottom.plot(curve.probed, curve.logits, **style)
    top.set_ylabel("loss (nats per byte)")
    top.set_ylim(top=min(8.0, top.get_ylim()[1]))
    bottom.set_ylabel("largest attention logit")
    bottom.set_yscale("log")
    bottom.axhline(1e3, color="grey", linestyle=":", linewidth=0.8)
    bottom.set_xlabel("step")
    top.legend(fontsize=8)
    figure.suptitle(title)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/instability.png"))
    parser.add_argument(
        "--recipes",
        nargs="+",
        choices=RECIPES,
        metavar="RECIPE",
        default=["baseline", "qk_norm", "qk_norm_cap", "qkv_norm", "qk_fc_norm"],
        help=f"of {', '.join(RECIPES)}",
    )
    args = parser.parse_args()
    join_world()
    data, curves = text(), {}
    print(f"learning rate {args.learning_rate:g}, {args.steps} steps of {BATCH} x {SEQUENCE} bytes, seed {args.seed}")
    print(f"guessing bytes by their frequency would cost {unigram(data):.2f} nats per byte\n")
    print(f"{'recipe':14} {'final loss':>10} {'lowest':>8} {'largest logit':>14} {'passes 10^3 at':>15} {'seconds':>8}")
    for recipe in args.recipes:
        curve = curves[recipe] = train(make_config(recipe, args.learning_rate, args.steps, args.seed), data)
        passed = next(
            (f"step {s}" for s, logit in zip(curve.probed, curve.logits, strict=True) if logit > 1e3), "never"
        )
        print(
            f"{recipe:14} {curve.final:10.3f} {min(curve.losses):8.3f} {max(curve.logits):14.1f} {passed:>15} "
            f"{curve.seconds:8.0f}",
            flush=True,
        )
    draw(curves, args.output, f"4 layers, width 128, bytes, learning rate {args.learning_rate:g}")
    print(f"\n{args.output}")


def unigram(data: Tensor) -> float:
    """Entropy of single bytes, nats."""
    p = torch.bincount(data, minlength=256).double() / len(data)
    return -sum(x * math.log(x) for x in p.tolist() if x)


if __name__ == "__main__":
    main()
