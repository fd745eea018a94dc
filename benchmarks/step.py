"""Tokens per second of our training step, through DeepSpeed, against a bare PyTorch loop over the same model.

    python benchmarks/step.py                    # this machine: one rank; then TP 2 and DP 2 on two ranks
    python benchmarks/step.py --size 830m --dtype bf16 --micro 4 --compile      # on a GPU

The bare loop is what one would write by hand: the same layers, the same loss, ``clip_grad_norm_``, the same fused
AdamW; for bf16 it keeps fp32 master weights and accumulates gradients in fp32 as the engine does. Both take turns in
one process, so that the ratio holds when the machine's speed drifts. Nothing is asserted.
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
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from megatron_stable.config.schema import Config
from megatron_stable.engine.engine import Engine
from megatron_stable.model.loss import language_model_loss
from megatron_stable.model.transformer import Transformer, layer_list
from megatron_stable.optim.groups import parameter_groups
from megatron_stable.parallel.topology import TensorParallel, Topology
from megatron_stable.parallel.world import join_world
from megatron_stable.training.flops import flops_per_token, peak_flops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_config(args: argparse.Namespace, data: int = 1, tensor: int = 1) -> Config:
    """The configuration that is measured, on ``data`` replicas of ``tensor`` ranks."""
    model = {"size": args.size, "recipe": args.recipe, "compile": args.compile}
    if args.layers:
        model["layers"] = args.layers
    model.setdefault("vocab_size", 256000 if args.size == "830m" else args.vocabulary)
    return Config.model_validate(
        {
            "model": model,
            "precision": {"dtype": args.dtype},
            "parallel": {"tensor": tensor},
            "batch": {"global_size": args.micro * args.accumulation * data, "micro_size": args.micro},
            "loss": {"z_loss": 1e-4},
        }
    )


class Bare:
    """The loop one would write by hand.

    Args:
        draw: Whether to draw the initial weights; else masters and weights are NaN, and to be filled.
    """

    def __init__(self, config: Config, device: torch.device, draw: bool = True) -> None:
        self.config, self.device = config, device
        self.dtype = DTYPES[config.precision.dtype]
        layers = layer_list(config.model, TensorParallel(), config.run.seed, device.type, draw)
        self.model = Transformer(layers).to(device)
        self.weights = list(self.model.parameters())
        if self.dtype == torch.float32:
            self.masters = self.weights
        else:
            self.masters = [nn.Parameter(weight.detach().clone()) for weight in self.weights]
            for master, weight in zip(self.masters, self.weights, strict=True):
                master.place = weight.place  # type: ignore[attr-defined]
                master.grad = torch.zeros_like(master)
            self.model.to(self.dtype)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.masters, config), fused=True)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4

    def step(self, micro_batches: list[Tensor]) -> Tensor:
        """The mean cross-entropy before the update, which stays on the device."""
        config, mean = self.config, torch.zeros((), device=self.device)
        for tokens in micro_batches:
            tokens = tokens.to(self.device)
            logits = self.model(tokens[:, :-1].contiguous())
            assert config.model.vocab_size is not None
            losses = language_model_loss(
                logits, tokens[:, 1:].contiguous(), TensorParallel(), config.model.vocab_size, config.loss.z_loss
            )
            mean += losses.cross_entropy.detach() / len(micro_batches)
            (sum(losses[1:], start=losses[0]) / len(micro_batches)).backward()
            if self.masters is not self.weights:
                for master, weight in zip(self.masters, self.weights, strict=True):
                    assert master.grad is not None and weight.grad is not None
                    master.grad += weight.grad
                    weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, config.optimizer.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.masters is self.weights)
        if self.masters is not self.weights:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.masters)
        return mean


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of one step."""
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turn(timed: Callable[[bool], float], count: int) -> list[tuple[float, float]]:
    """Times of steps (with something, without it), pair by pair."""
    pairs = []
    for turn in range(count):
        first = timed(turn % 2 == 0)  # who is first changes: the second may find warm caches
        second = timed(turn % 2 != 0)
        pairs.append((first, second) if turn % 2 == 0 else (second, first))
    return pairs


def batches(config: Config, rank: int = 0, ranks: int = 1) -> list[Tensor]:
    """This replica's random micro batches."""
    assert config.model.vocab_size is not None
    shape = (config.batch.micro_size, config.model.sequence_length + 1)
    count = config.batch.global_size // (config.batch.micro_size * ranks)
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(config.model.vocab_size, shape, generator=generator) for _ in range(count)]


def one_rank(args: argparse.Namespace) -> None:
    """Engine and bare loop in turn, in this process."""
    join_world()
    config = make_config(args)
    engine = Engine(config, Topology())
    bare = Bare(config, engine.device)
    micro_batches = batches(config)
    steps = iter(range(1, 10**9))
    spent = {True: 0.0, False: 0.0}  # processor time of the engine, of the bare loop

    def step(engines: bool) -> float:
        began = time.process_time()
        seconds = timed(
            (lambda: engine.train_step(next(steps), micro_batches, 1e-4))
            if engines
            else (lambda: bare.step(micro_batches)),
            engine.device,
        )
        spent[engines] += time.process_time() - began
        return seconds

    in_turn(step, args.warmup)
    spent.update({True: 0.0, False: 0.0})
    ours, theirs = zip(*in_turn(step, args.steps), strict=True)
    tokens = config.batch.global_size * config.model.sequence_length
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    rate = tokens / statistics.median(ours)
    show("bare PyTorch loop, 1 rank", tokens / statistics.median(theirs), None, config)
    show("engine, 1 rank", rate, statistics.median(ratios), config)
    print(
        f"    ratio engine / bare, pair by pair: median {statistics.median(ratios):.3f}, 10%..90% {low:.3f}..{high:.3f}"
    )
    print(f"    by the host's processor time: {spent[False] / spent[True]:.3f}")


def show(what: str, rate: float, ratio: float | None, config: Config) -> None:
    """One line of the table."""
    line = f"{what:32} {rate:12,.0f} tokens/s"
    if ratio is not None:
        line += f"   {ratio:5.3f} x"
    if peak := peak_flops(config.precision.dtype):
        line += f"   MFU {rate * flops_per_token(config.model) / peak:.1%}"
    print(line, flush=True)


def several_ranks(args: argparse.Namespace) -> None:
    """On each rank of a launcher: the engine alone; rank 0 prints its rate as JSON."""
    join_world()
    topology = Topology(tensor=args.tensor)
    config = make_config(args, data=topology.data_size, tensor=args.tensor)
    engine = Engine(config, topology)
    micro_batches = batches(config, topology.data_rank, topology.data_size)
    times = [
        timed(lambda step=step: engine.train_step(step, micro_batches, 1e-4), engine.device)  # type: ignore[misc]
        for step in range(1, args.warmup + args.steps + 1)
    ]
    if topology.rank == 0:
        tokens = config.batch.global_size * config.model.sequence_length
        print(json.dumps({"rate": tokens / statistics.median(times[args.warmup :])}), flush=True)
    torch.distributed.destroy_process_group()


def launch(args: argparse.Namespace, tensor: int) -> float:
    """Tokens/s on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__, *sys.argv[1:]]
    done = subprocess.run([*command, "--tensor", str(tensor)], capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith('{"rate"')]
    if not found:
        raise SystemExit(done.stdout + done.stderr)
    return float(json.loads(found[-1])["rate"])


def options(doc: str | None, steps: int) -> argparse.ArgumentParser:
    """What is measured."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--layers", type=int, help="fewer layers than the size has")
    parser.add_argument("--recipe", default="qk_norm")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--micro", type=int, default=4, help="sequences per micro batch")
    parser.add_argument("--accumulation", type=int, default=2, help="micro batches per step and replica")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    return parser


def main() -> None:
    parser = options(__doc__, steps=20)
    parser.add_argument("--tensor", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tensor:
        several_ranks(args)
        return
    gpus = torch.cuda.device_count()
    device = torch.cuda.get_device_name() if gpus else f"CPU, {os.cpu_count()} cores, 1 thread a rank"
    print(f"{device}; torch {torch.__version__}, Python {platform.python_version()}; {vars(args)}")
    two_ranks = (
        {}
        if gpus == 1
        else {f"engine, 2 ranks, {name}": launch(args, tensor) for name, tensor in (("TP 2", 2), ("DP 2", 1))}
    )
    one_rank(args)
    for name, rate in two_ranks.items():
        show(name, rate, None, make_config(args))


if __name__ == "__main__":
    main()
